"""One of the two models by itself, for trainers that score with it; knows both ends of the rule for α, no route."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from midlogit.core.rules import FixedAlpha
from midlogit.params import SamplingParams
from midlogit.server.errors import ApiError
from midlogit.server.wire.requests import Sampling

Side = Literal["base", "teacher"]


def alone(params: SamplingParams, side: Side) -> SamplingParams:
    """The parameters under which one model is sampled alone, over every id that both models have."""
    return replace(
        params,
        alpha_rule=FixedAlpha(float(side == "teacher")),
        force_first_token=False,
        constraint_to_target=False,
        exclude_special_tokens=False,
        merge_stop_ids=False,
        stop_id=side,
    )


def require_no_mixture(body: Sampling, side: Side) -> None:
    """Refuses options of the mixture where one model is asked alone.

    Raises:
        ApiError: 400, naming the first.
    """
    for name in sorted(body.midlogit.model_fields_set - {"diagnostics"}):
        raise ApiError(
            400,
            "unsupported_option",
            f"midlogit.{name} is of the mixture, and this is the {side} alone.",
            "Leave it out.",
            param=f"midlogit.{name}",
        )
