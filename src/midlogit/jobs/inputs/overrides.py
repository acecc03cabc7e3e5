"""Parameters that a row sets for itself: their types, their check, how they change those of the job; knows no file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from midlogit.core.rules import parse_rule
from midlogit.errors import InvalidRequest
from midlogit.messages import of_each_side
from midlogit.params import PRESETS, SamplingParams
from midlogit.requests.prompts import Reading

WHOLE = "a whole number"
NUMBER = "a number"
TEXT = "text"
TEXTS = "text or a list of texts"
KINDS = {
    "n": WHOLE,
    "seed": WHOLE,
    "max_tokens": WHOLE,
    "temperature": NUMBER,
    "stop": TEXTS,
    "preset": TEXT,
    "alpha_rule": TEXT,
    "stop_id": TEXT,
    "target_top_p": NUMBER,
}
OF_PRESETS = (
    "force_first_token",
    "constraint_to_target",
    "target_top_p",
    "exclude_special_tokens",
    "stop_id",
)
PARAMETERS = tuple(KINDS)  # columns of these names are parameters
UNCHECKED = ("seed", "chat_template_kwargs")  # any will do for some job
LENIENT = SamplingParams(max_tokens=2**31 - 1, top_logprobs=20)  # takes what some job takes


def with_overrides(params: SamplingParams, overrides: Mapping[str, Any]) -> SamplingParams:
    """The job's parameters with those of a row.

    Args:
        overrides: fields of SamplingParams by name; `preset` sets those of the preset, and its rule if it has a budget;
            `alpha_rule` is text as `parse_rule` reads it; `target_top_p` also turns the constraint on. `top_logprobs`
            changes nothing, but the job must report as many; `chat_template_kwargs` is for `require_reading`.

    Raises:
        InvalidRequest: a value that cannot be honoured.
    """
    changes = dict(overrides)
    changes.pop("chat_template_kwargs", None)
    if (top := changes.pop("top_logprobs", 0)) > params.top_logprobs:
        raise InvalidRequest(
            f"It asks for {top} top_logprobs, and the job reports {params.top_logprobs}.",
            f"Run the job with --top-logprobs {top}.",
        )
    if (name := changes.pop("preset", None)) is not None:
        preset = SamplingParams.preset(
            name, max_tokens=changes.get("max_tokens", params.max_tokens)
        )
        for field in OF_PRESETS:
            changes.setdefault(field, getattr(preset, field))
        if PRESETS[name].budget is not None:
            changes.setdefault("alpha_rule", preset.alpha_rule.spec)
    if "target_top_p" in overrides:
        changes["constraint_to_target"] = True
    if "alpha_rule" in changes:
        changes["alpha_rule"] = parse_rule(changes["alpha_rule"])
    return replace(params, **changes) if changes else params


def require_reading(reading: Reading, overrides: Mapping[str, Any]) -> None:
    """Refuses a row whose prompts would need other template variables than the job has.

    Raises:
        InvalidRequest: says which.
    """
    asked = overrides.get("chat_template_kwargs")
    if asked is not None and of_each_side(reading.chat_template_kwargs) != (asked, asked):
        raise InvalidRequest(
            "Its 'chat_template_kwargs' are not those of the job.",
            f"Run the job with --chat-template-kwargs '{json.dumps(asked)}'.",
        )


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Checks each parameter of a row by itself.

    Raises:
        InvalidRequest: of a wrong type or out of range; names the column and its value.
    """
    for name, value in overrides.items():
        if name in KINDS and not _is(KINDS[name], value):
            raise InvalidRequest(
                f"Its {name!r} is {value!r:.80}, not {KINDS[name]}.",
                "If it is no parameter, rename the column.",
            )
        if name in UNCHECKED:
            continue
        refused = _refusal(name, tuple(value) if isinstance(value, list) else value)
        if refused is not None:
            raise InvalidRequest(f"Its {name!r} is {value!r:.80}: {refused}")


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if kind == TEXTS and isinstance(value, list):
        return all(isinstance(text, str) for text in value)
    types: dict[str, Any] = {WHOLE: int, NUMBER: int | float}
    return isinstance(value, types.get(kind, str))


@lru_cache(maxsize=1024)
def _refusal(name: str, value: Any) -> str | None:
    """Why a value cannot be honoured; None where it can."""
    try:
        with_overrides(LENIENT, {name: value})
    except InvalidRequest as error:
        return str(error)
    return None
