"""Turns the fields of a body into SamplingParams and prompts; knows the wire's names and the library's."""

from __future__ import annotations

from typing import Any

from midlogit.core.rules import parse_rule
from midlogit.messages import TemplateVariables
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt
from midlogit.server.errors import ApiError
from midlogit.server.settings import ServerSettings
from midlogit.server.wire.requests import Message, MixtureOptions, Sampling


def sampling_params(
    body: Sampling, settings: ServerSettings, *, max_tokens: int, top_logprobs: int
) -> SamplingParams:
    """The sampling parameters of a request. For a trainer completions end with the base's id, whatever the preset.

    Raises:
        InvalidRequest: a value cannot be honoured.
    """
    options = body.midlogit
    changes: dict[str, Any] = {}
    if options.target_top_p is not None:
        changes |= {"constraint_to_target": True, "target_top_p": options.target_top_p}
    if options.force_first_token is not None:
        changes["force_first_token"] = options.force_first_token
    if options.alpha_rule is not None:
        changes["alpha_rule"] = parse_rule(options.alpha_rule)
    if options.stop_id is not None or settings.train:
        changes["stop_id"] = options.stop_id or "base"

    return SamplingParams.preset(
        settings.preset if options.preset is None else options.preset,
        n=body.n,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=float(body.temperature),
        seed=body.seed,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        top_logprobs=top_logprobs,
        **changes,
    )


def base_prompts(options: MixtureOptions, count: int) -> list[Prompt] | None:
    """The base's own prompt for each of `count` requests; None when it has the common one."""
    return None if options.base_prompt is None else [_shared(options.base_prompt)] * count


def teacher_prompts(options: MixtureOptions, count: int) -> list[Prompt] | None:
    """The teacher's own prompt for each of `count` requests; None when it has the common one.

    Raises:
        ApiError: 400 for a list of another length.
    """
    given = options.teacher_prompt
    if given is None:
        return None
    if isinstance(given, str) or isinstance(given[0], int | Message):
        return [_shared(given)] * count
    if len(given) != count:
        raise ApiError(
            400,
            "invalid_request",
            f"There are {count} prompts and {len(given)} of the teacher. Give one for each.",
            param="midlogit.teacher_prompt",
        )
    return [_plain(prompt) for prompt in given]


def _shared(prompt: Any) -> Prompt:
    """A prompt of all requests of a body, in a form that is read once."""
    plain = _plain(prompt)
    return plain if isinstance(plain, str) else tuple(plain)  # type: ignore[return-value]


def _plain(prompt: Any) -> Prompt:
    """A prompt of a body as the library takes it."""
    if isinstance(prompt, list) and isinstance(prompt[0], Message):
        return [message.plain for message in prompt]
    return prompt  # type: ignore[no-any-return]


def _is_chat(prompt: Any, common: bool) -> bool:
    """Whether a side's own prompt, or the first of a list of them, is read as a chat; text as the common prompt is."""
    while isinstance(prompt, list):
        prompt = prompt[0]
    return isinstance(prompt, Message) or (common and not isinstance(prompt, int))


def template_kwargs(
    given: TemplateVariables | None,
    options: MixtureOptions,
    defaults: tuple[TemplateVariables, TemplateVariables],
    *,
    chat: bool,
) -> tuple[TemplateVariables, TemplateVariables]:
    """Variables of the chat templates of (base, teacher): the request's, then the server's defaults.

    Args:
        given: the request's for both sides; variables of the base's own replace them for the base.
        chat: whether the common prompt is a chat.

    Raises:
        ApiError: 400 for variables of the base's own where its prompt is not a chat.
    """
    own = options.base_chat_template_kwargs
    base_is_chat = _is_chat(options.base_prompt, chat)
    teacher_is_chat = _is_chat(options.teacher_prompt, chat)
    if own and not base_is_chat:
        name = "midlogit.base_chat_template_kwargs"
        raise ApiError(
            400, "unsupported_option", f"{name} is given, and the base reads no chat.", param=name
        )
    both = given or {}
    base = {**defaults[0], **(both if own is None else own)} if base_is_chat else {}
    return base, {**defaults[1], **both} if teacher_is_chat else {}
