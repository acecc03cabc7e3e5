"""From the fields of a body to SamplingParams and prompts; knows the wire's names and the library's."""

from __future__ import annotations

from typing import Any

from midlogit.core.rules import parse_rule
from midlogit.params import SamplingParams
from midlogit.prompts import Prompt
from midlogit.server.wire.requests import Message, MixtureOptions, Sampling


def sampling_params(body: Sampling, preset: str, *, max_tokens: int, top_logprobs: int) -> SamplingParams:
    """The parameters of a request.

    Raises:
        InvalidRequest: a value that cannot be honoured.
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
    """The base's own prompt for each of `count` requests, None when it reads what the teacher reads."""
    prompt = options.base_prompt
    if prompt is None:
        return None
    if isinstance(prompt, list) and isinstance(prompt[0], Message):
        return [[message.plain for message in prompt if isinstance(message, Message)]] * count
    return [prompt] * count
