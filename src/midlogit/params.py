"""Parameters of a request: SamplingParams and the presets; validates, knows no model and no engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from midlogit.core.outcomes import StopId
from midlogit.core.rules import AlphaRule, EqualKL, KLBudget
from midlogit.errors import InvalidRequest
from midlogit.kinds import KINDS, require_count, require_kind


@dataclass(frozen=True, slots=True)
class Preset:
    """A named setting of the mixture: how far the teacher is held to be right.

    Attributes:
        force_first_token: the first generated token is drawn from the teacher alone.
        target_top_p: the support is held to the teacher's top-p nucleus; None for no constraint.
        exclude_special_tokens, stop_id: as of SamplingParams.
        budget: the rule is a KL budget: so many nats for a whole completion, at most BUDGET_OF_A_TOKEN each.
    """

    name: str
    force_first_token: bool
    target_top_p: float | None
    description: str
    exclude_special_tokens: bool = True
    stop_id: StopId = "teacher"
    budget: float | None = None

    def rule(self, max_tokens: int) -> AlphaRule:
        """The rule for completions of so many tokens."""
        if self.budget is None:
            return EqualKL()
        return KLBudget(min(BUDGET_OF_A_TOKEN, self.budget / max(max_tokens, 1)))


BUDGET_OF_A_TOKEN = 0.02  # nats


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "conservative",
            True,
            0.90,
            "first token from the teacher, support held to its top-p 0.90",
        ),
        Preset(
            "balanced",
            True,
            0.95,
            "first token from the teacher, support held to its top-p 0.95 (default)",
        ),
        Preset(
            "exploratory",
            False,
            None,
            "no forced token, no constraint: q* over the whole vocabulary",
        ),
        Preset(
            "rollout",
            False,
            None,
            "for trainers of the base: whole vocabulary, the base's own stop id, at most 0.25 nats a completion",
            exclude_special_tokens=False,
            stop_id="base",
            budget=0.25,
        ),
    )
}
DEFAULT_PRESET = "balanced"
DEFAULT_MAX_TOKENS = 256
MOST_LOGPROBS = 256  # candidates of a position
MOST_SAMPLES = 16384  # of one prompt, as in vLLM: each takes memory before the first begins


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters; names and meanings are vLLM's where vLLM has them.

    Attributes:
        n: completions for each prompt, 1 to 16384.
        max_tokens: most generated tokens, the ending one included.
        min_tokens: no ending id is drawn, and no stop string counts that ends, before this many tokens.
        temperature: divides both models' logits before the solve; 0 takes the most likely token of q*
            solved at temperature 1.
        seed: the same request with the same seed draws the same tokens, whatever else is in the batch; different
            requests of one seed are independent. None draws a fresh seed for each prompt.
        stop: strings that end the text; the text ends before them.
        stop_token_ids: further ids that end the sequence.
        ignore_eos: go on to max_tokens; the models' stop ids are masked.
        top_logprobs: report this many most likely tokens of q, base and teacher at each position (0 to 256);
            servers list no more than their --max-logprobs.
        force_first_token: draw the first token from the teacher (α = 1).
        constraint_to_target: hold the support to the teacher's nucleus of mass target_top_p.
        target_top_p: in (0, 1].
        exclude_special_tokens: mask every special id of either tokenizer that does not end a sequence.
        special_token_ids: further ids to mask.
        merge_stop_ids: count the stop ids of both models as one outcome. Off, each is an outcome of its own, both
            stop probabilities vanish in the mixture, and sequences run on: for comparison only.
        stop_id: which id is emitted when the merged stop class is drawn: the teacher's most likely, or one drawn from
            the base's own conditional, so that a trainer of the base sees an ending of its own and its exact ratio.
        return_support: report the ids of the support at each position; for a nucleus only, since without one they are
            the vocabulary.
        alpha_rule: how α is chosen at each token; equal KL by default.
        alpha_tol: solver tolerance on α and on |KL_base − KL_teacher| (docs/theory.md (11)).

    Raises:
        InvalidRequest: a value of another kind or out of range, naming what is allowed.
    """

    n: int = 1
    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    temperature: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    force_first_token: bool = True
    constraint_to_target: bool = True
    target_top_p: float = 0.95
    exclude_special_tokens: bool = True
    special_token_ids: tuple[int, ...] = ()
    merge_stop_ids: bool = True
    stop_id: StopId = "teacher"
    return_support: bool = False
    alpha_rule: AlphaRule = EqualKL()
    alpha_tol: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type in KINDS:
                require_kind(str(field.type), **{field.name: getattr(self, field.name)})
        if self.seed is not None:
            require_kind("int", seed=self.seed)
        self._keep_tuple("stop", str, "strings")
        self._keep_tuple("stop_token_ids", Integral, "ids")
        self._keep_tuple("special_token_ids", Integral, "ids")
        _require(
            1 <= self.n <= MOST_SAMPLES, f"n is {self.n}.", f"It must lie in 1 to {MOST_SAMPLES}."
        )
        require_count(max_tokens=self.max_tokens)
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens is {self.min_tokens}.",
            f"It must lie between 0 and max_tokens ({self.max_tokens}).",
        )
        _require(
            self.temperature >= 0 and math.isfinite(self.temperature),
            f"temperature is {self.temperature}.",
            "It must be 0 (greedy) or a positive number.",
        )
        _require(
            0 < self.target_top_p <= 1,
            f"target_top_p is {self.target_top_p}.",
            "It must lie in (0, 1].",
        )
        _require(
            0 <= self.top_logprobs <= MOST_LOGPROBS,
            f"top_logprobs is {self.top_logprobs}.",
            f"It must lie in 0 to {MOST_LOGPROBS}.",
        )
        _require(
            0 < self.alpha_tol <= 0.1, f"alpha_tol is {self.alpha_tol}.", "It must lie in (0, 0.1]."
        )
        _require(
            self.stop_id in ("teacher", "base"),
            f"stop_id is {self.stop_id!r:.80}.",
            "It must be 'teacher' or 'base'.",
        )
        _require(
            self.constraint_to_target or not self.return_support,
            "return_support is set, and the support is the whole vocabulary.",
            "Hold it to a nucleus (constraint_to_target), or leave return_support out.",
        )
        _require(all(self.stop), "A stop string is empty.", "Leave it out.")
        _require(
            isinstance(self.alpha_rule, AlphaRule),
            f"alpha_rule is {self.alpha_rule!r:.80}.",
            "Use EqualKL(), FixedAlpha(α) or KLBudget(nats), or parse_rule('equal-kl').",
        )

    def _keep_tuple(self, name: str, kind: type, words: str) -> None:
        """Keeps what may be given as any iterable, or a string for one, as a tuple."""
        given = getattr(self, name)
        items = (
            (*given,) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
        )
        _require(
            isinstance(given, Iterable) and all(isinstance(item, kind) for item in items),
            f"{name} is {given!r:.80}.",
            f"It must be a list of {words}.",
        )
        object.__setattr__(self, name, items)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SamplingParams:
        """The parameters of a preset, with changes.

        The preset "rollout" is for training the base on weighted samples of q*. The weight of a completion has the
        mean logarithm −Σ KL(q‖base), so the KL budget is a quarter nat for all of max_tokens: the effective sample
        size of weights of whole completions stays near exp(−2 · 0.25) = 0.6.

        Raises:
            InvalidRequest: an unknown preset, naming the known ones.
        """
        if name not in PRESETS:
            raise InvalidRequest(f"Unknown preset {name!r:.80}.", f"Use {', '.join(PRESETS)}.")
        preset = PRESETS[name]
        max_tokens = changes.get("max_tokens", DEFAULT_MAX_TOKENS)
        require_kind("int", max_tokens=max_tokens)
        chosen: dict[str, Any] = {
            "force_first_token": preset.force_first_token,
            "constraint_to_target": preset.target_top_p is not None,
            "exclude_special_tokens": preset.exclude_special_tokens,
            "stop_id": preset.stop_id,
            "alpha_rule": preset.rule(max_tokens),
        }
        if preset.target_top_p is not None:
            chosen["target_top_p"] = preset.target_top_p
        return cls(**{**chosen, **changes})


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise InvalidRequest(message, hint)
