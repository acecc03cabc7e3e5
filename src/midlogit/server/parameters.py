"""Turns the fields of a body into SamplingParams and prompts; knows the wire's names and the library's."""

from __future__ import annotations

from typing import Any

from midlogit.core.rules import parse_rule
from midlogit.messages import TemplateVariables
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt
from midlogit.server.errors import ApiError
from midlogit.server.wire.requests import Message, MixtureOptions, Sampling


def sampling_params(
    body: Sampling, preset: str, *, max_tokens: int, top_logprobs: int
) -> SamplingParams:
    """The sampling parameters of a request.

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

    return SamplingParams.preset(
        preset if options.preset is None else options.preset,
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
    """The base's own prompt for each of `count` requests; None when it has the teacher's."""
    prompt = options.base_prompt
    if prompt is None:
        return None
    if isinstance(prompt, list) and isinstance(prompt[0], Message):
        return [[message.plain for message in prompt if isinstance(message, Message)]] * count
    return [prompt] * count


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
        chat: whether the teacher's prompt is a chat.

    Raises:
        ApiError: 400 for variables of the base's own where its prompt is not a chat.
    """
    prompt, own = options.base_prompt, options.base_chat_template_kwargs
    base_is_chat = isinstance(prompt[0], Message) if isinstance(prompt, list) else chat
    if own and not base_is_chat:
        name = "midlogit.base_chat_template_kwargs"
        raise ApiError(
            400, "unsupported_option", f"{name} is given, and the base reads no chat.", param=name
        )
    both = given or {}
    base = {**defaults[0], **(both if own is None else own)} if base_is_chat else {}
    return base, {**defaults[1], **both} if chat else {}
