"""midlogit: sample text from the exact middle of two language models.

Names are imported when first used, so that `import midlogit` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midlogit.core.rules import AlphaRule, EqualKL, FixedAlpha, KLBudget, parse_rule
    from midlogit.engines.http.upstream import Upstream
    from midlogit.errors import (
        EngineFailure,
        Interrupted,
        InvalidField,
        InvalidRequest,
        MidlogitError,
        MissingExtra,
        ModelUnavailable,
        PairMismatch,
        PromptTooLong,
    )
    from midlogit.outputs import (
        Completion,
        Decision,
        Diagnostics,
        Scores,
        Statistics,
        Token,
        Top,
        Usage,
    )
    from midlogit.pair import Pair
    from midlogit.params import PRESETS, Preset, SamplingParams
    from midlogit.rollout import Rollout, WeightVersion

__version__ = "0.1.0"

_HOMES = {
    "midlogit.core.rules": ("AlphaRule", "EqualKL", "FixedAlpha", "KLBudget", "parse_rule"),
    "midlogit.engines.http.upstream": ("Upstream",),
    "midlogit.errors": (
        "EngineFailure",
        "Interrupted",
        "InvalidField",
        "InvalidRequest",
        "MidlogitError",
        "MissingExtra",
        "ModelUnavailable",
        "PairMismatch",
        "PromptTooLong",
    ),
    "midlogit.outputs": (
        "Completion",
        "Decision",
        "Diagnostics",
        "Scores",
        "Statistics",
        "Token",
        "Top",
        "Usage",
    ),
    "midlogit.pair": ("Pair",),
    "midlogit.params": ("PRESETS", "Preset", "SamplingParams"),
    "midlogit.rollout": ("Rollout", "WeightVersion"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "AlphaRule",
    "Completion",
    "Decision",
    "Diagnostics",
    "EngineFailure",
    "EqualKL",
    "FixedAlpha",
    "Interrupted",
    "InvalidField",
    "InvalidRequest",
    "KLBudget",
    "MidlogitError",
    "MissingExtra",
    "ModelUnavailable",
    "Pair",
    "PairMismatch",
    "Preset",
    "PromptTooLong",
    "Rollout",
    "SamplingParams",
    "Scores",
    "Statistics",
    "Token",
    "Top",
    "Upstream",
    "Usage",
    "WeightVersion",
    "parse_rule",
]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'midlogit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
