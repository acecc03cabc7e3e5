"""Results for the user: tokens as they are sampled, completions with their diagnostics, statistics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.rollout import Rollout, WeightVersion

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorType = Literal["request", "engine"]
Side = Literal["base", "teacher"]
OCCASIONAL = (
    "top",
    "support",
    "weight_versions",
    "weights_changed",
    "error",
    "error_type",
)  # fields of a Completion
Candidates = list[tuple[int, float]]  # (token id, log-probability), most likely first


@dataclass(frozen=True, slots=True, eq=False)
class Top:
    """The most likely tokens at one position: under q as sampled, under each model alone (raw)."""

    q: Candidates
    base: Candidates
    teacher: Candidates

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Top):
            return NotImplemented
        return (self.q, self.base, self.teacher) == (other.q, other.base, other.teacher)


@dataclass(slots=True)  # one per token: a frozen one takes three times as long to make
class Decision:
    """One drawn token and what is known of it; `error` says why nothing was drawn instead.

    Attributes:
        token_id: the drawn id; for the merged stop class the teacher's most likely stop id, or one drawn from the
            base's own conditional (SamplingParams.stop_id).
        logprob: log q of what was drawn: of the outcome, and with stop_id "base" of the id.
        base_logprob, teacher_logprob: of the outcome, raw: untempered, unmasked (docs/theory.md (20)).
        base_tempered_logprob, teacher_tempered_logprob: of the id, at the sampling temperature, over the model's whole
            vocabulary (docs/theory.md (20a)); temperature 0 counts as 1.
        base_support_logprob, teacher_support_logprob: of the outcome as it entered the solve: tempered, masked, merged,
            normalised on the support.
        base_support_logmass, teacher_support_logmass: log of the mass that the whole tempered model has on the support.
        forced: drawn from the teacher because the first token is forced.
        fallback: drawn from the teacher because the supports were disjoint.
        constrained: drawn from the teacher's nucleus.
        coverage: mass of the model of which less was seen; 1 for whole rows.
        alpha_bound, tv_bound: certified bounds on |α − α*| and on the total variation between the sampled and
            the exact q* (docs/theory.md (26a), (30)); 0 for whole rows.
        base_bounded, teacher_bounded: whether base_logprob or teacher_logprob is only an upper bound, because the
            server neither listed nor scored the id.
        base_tempered_bound, teacher_tempered_bound: certified bounds on the error of the tempered log-probabilities
            (docs/theory.md (34a)), ∞ where only an estimate is known; 0 for whole rows.
        support: the ids of the support in order, where return_support asks for them.
    """

    token_id: int
    alpha: float
    kl_base: float
    kl_teacher: float
    entropy: float
    ess_base: float
    ess_teacher: float
    logprob: float
    base_logprob: float
    teacher_logprob: float
    base_tempered_logprob: float
    teacher_tempered_logprob: float
    base_support_logprob: float
    teacher_support_logprob: float
    base_support_logmass: float
    teacher_support_logmass: float
    forced: bool
    fallback: bool
    constrained: bool
    coverage: float = 1.0
    alpha_bound: float = 0.0
    tv_bound: float = 0.0
    base_bounded: bool = False
    teacher_bounded: bool = False
    base_tempered_bound: float = 0.0
    teacher_tempered_bound: float = 0.0
    top: Top | None = None
    support: list[int] | None = None
    error: str | None = None

    @property
    def ess_ratio(self) -> float:
        return self.ess_base / self.ess_teacher if self.ess_teacher else float("inf")


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token of a stream.

    Attributes:
        index: which prompt of the call; sample: which of its n completions.
        position: 0 for the first generated token.
        text: what this token adds to the text; empty while a character or a stop string is undecided.
        token: the drawn token's own text inside a text, with its space.
        decision: α, both KLs and the rest of what is known of the draw.
        finish_reason: set on the last token of a completion.
        weight_version: of the base's weights that drew the token; None while no version was ever set.
    """

    index: int
    sample: int
    position: int
    token_id: int
    text: str
    token: str
    decision: Decision
    finish_reason: FinishReason | None
    weight_version: int | str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; prompt_tokens is the teacher's prompt, base_prompt_tokens the base's."""

    prompt_tokens: int
    base_prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """One entry for each generated token (docs/theory.md section 9); KLs, entropy and logprobs in nats.

    Attributes:
        alpha: weight of the teacher. kl_base, kl_teacher: KL(q‖base), KL(q‖teacher) on the support.
        entropy: of q. ess_base, ess_teacher, ess_ratio: effective sample sizes and their quotient.
        logprobs: log q of the drawn token, under the distribution it was drawn from.
        base_logprobs, teacher_logprobs: raw log-probabilities of the drawn token, untempered, full vocabulary.
        base_tempered_logprobs, teacher_tempered_logprobs: the same at the sampling temperature, of the emitted id even
            where a stop class was drawn.
        base_support_logprobs, teacher_support_logprobs: as they entered the solve: tempered, masked, on the support.
        base_support_logmass, teacher_support_logmass: log of the mass of that support under each whole tempered model.
        forced: whether the token was forced to the teacher.
        base_bounded, teacher_bounded: whether base_logprobs or teacher_logprobs is only an upper bound there, because
            the server neither listed nor scored the token; never for engines that see the full vocabulary.
        coverage: mass of both models that was seen, 1 for engines that see the full vocabulary.
        alpha_bound, tv_bound: certified bounds on |α − α*| and on the total variation between the sampled and
            the exact q*, 0 for them.
        base_tempered_bound, teacher_tempered_bound: certified bounds on the error of the tempered log-probabilities,
            0 for them.
    """

    alpha: list[float] = field(default_factory=list)
    kl_base: list[float] = field(default_factory=list)
    kl_teacher: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    ess_base: list[float] = field(default_factory=list)
    ess_teacher: list[float] = field(default_factory=list)
    ess_ratio: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    base_logprobs: list[float] = field(default_factory=list)
    teacher_logprobs: list[float] = field(default_factory=list)
    base_tempered_logprobs: list[float] = field(default_factory=list)
    teacher_tempered_logprobs: list[float] = field(default_factory=list)
    base_support_logprobs: list[float] = field(default_factory=list)
    teacher_support_logprobs: list[float] = field(default_factory=list)
    base_support_logmass: list[float] = field(default_factory=list)
    teacher_support_logmass: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    alpha_bound: list[float] = field(default_factory=list)
    tv_bound: list[float] = field(default_factory=list)
    base_bounded: list[bool] = field(default_factory=list)
    teacher_bounded: list[bool] = field(default_factory=list)
    base_tempered_bound: list[float] = field(default_factory=list)
    teacher_tempered_bound: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, decisions: list[Decision]) -> Diagnostics:
        return cls(
            alpha=[d.alpha for d in decisions],
            kl_base=[d.kl_base for d in decisions],
            kl_teacher=[d.kl_teacher for d in decisions],
            entropy=[d.entropy for d in decisions],
            ess_base=[d.ess_base for d in decisions],
            ess_teacher=[d.ess_teacher for d in decisions],
            ess_ratio=[d.ess_ratio for d in decisions],
            logprobs=[d.logprob for d in decisions],
            base_logprobs=[d.base_logprob for d in decisions],
            teacher_logprobs=[d.teacher_logprob for d in decisions],
            base_tempered_logprobs=[d.base_tempered_logprob for d in decisions],
            teacher_tempered_logprobs=[d.teacher_tempered_logprob for d in decisions],
            base_support_logprobs=[d.base_support_logprob for d in decisions],
            teacher_support_logprobs=[d.teacher_support_logprob for d in decisions],
            base_support_logmass=[d.base_support_logmass for d in decisions],
            teacher_support_logmass=[d.teacher_support_logmass for d in decisions],
            forced=[d.forced for d in decisions],
            coverage=[d.coverage for d in decisions],
            alpha_bound=[d.alpha_bound for d in decisions],
            tv_bound=[d.tv_bound for d in decisions],
            base_bounded=[d.base_bounded for d in decisions],
            teacher_bounded=[d.teacher_bounded for d in decisions],
            base_tempered_bound=[d.base_tempered_bound for d in decisions],
            teacher_tempered_bound=[d.teacher_tempered_bound for d in decisions],
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Attributes:
        index: which prompt of the call; sample: which of its n completions.
        prompt: the teacher's prompt as it was given; base_prompt: the base's.
        prompt_token_ids: what the teacher read of it; base_prompt_token_ids: what the base read.
        text: what the generated ids add to the prompt's text (midlogit.models.detokenize), without ending ids and stop
            strings.
        token_ids: every generated id, the ending one included.
        finish_reason: stop, length, abort or error.
        stop_reason: the stop string or the id of stop_token_ids that ended it; None for the models' own stop. "support"
            where a server lets its supports have no more ids.
        top: candidates at each position when top_logprobs was asked for.
        support: the ids of the support at each position when return_support was asked for.
        weight_versions: which version of the base's weights drew which tokens; empty while no version was ever set.
        weights_changed: sides whose server was found to have other weights under the same name than when the pair was
            opened or last updated, and which tokens were drawn from (docs/http.md).
        error: what went wrong, when finish_reason is "error".
        error_type: "request" where this request cannot be honoured, "engine" where the engine or a server behind it
            failed, so that the same request may succeed later.
    """

    index: int
    sample: int
    prompt: Any
    base_prompt: Any
    prompt_token_ids: list[int]
    base_prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None
    usage: Usage
    diagnostics: Diagnostics
    top: list[Top] | None = None
    support: list[list[int]] | None = None
    weight_versions: list[WeightVersion] = field(default_factory=list)
    weights_changed: list[Side] = field(default_factory=list)
    error: str | None = None
    error_type: ErrorType | None = None

    def rollout(self) -> Rollout:
        """What a trainer needs of it (`midlogit.rollout`).

        Raises:
            EngineFailure, InvalidRequest: the completion ended with an error.
        """
        if self.finish_reason == "error":
            kind = InvalidRequest if self.error_type == "request" else EngineFailure
            raise kind(f"Completion {self.index}, sample {self.sample}: {self.error}")
        d = self.diagnostics
        return Rollout(
            prompt_token_ids=self.base_prompt_token_ids,
            teacher_prompt_token_ids=self.prompt_token_ids,
            token_ids=self.token_ids,
            logprobs=d.logprobs,
            base_logprobs=d.base_tempered_logprobs,
            teacher_logprobs=d.teacher_tempered_logprobs,
            base_support_logprobs=d.base_support_logprobs,
            teacher_support_logprobs=d.teacher_support_logprobs,
            base_support_logmass=d.base_support_logmass,
            teacher_support_logmass=d.teacher_support_logmass,
            alpha=d.alpha,
            kl_base=d.kl_base,
            kl_teacher=d.kl_teacher,
            support=self.support,
            finish_reason=self.finish_reason,
            weight_versions=self.weight_versions,
            weights_changed=self.weights_changed,
            text=self.text,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; fields that only some completions have, only when they say something."""
        data = asdict(self)
        data["weight_versions"] = [span._asdict() for span in self.weight_versions]
        return {key: value for key, value in data.items() if value or key not in OCCASIONAL}


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of the tokens of one given text under q*.

    Attributes:
        index: which text of the call.
        token_ids: what the teacher read; base_token_ids: what the base read.
        first: the first scored token of `token_ids`; all from there on are scored. The tokens before it are
            context: the first token of all has nothing before it, and where the two sides read different
            ids, only their common ending is scored.
        diagnostics: one entry for each scored token; `logprobs` are log q, −inf where q gives it nothing.
        top: candidates at each scored position when top_logprobs was asked for.
        weights_changed: sides whose server was found to have other weights, as in `Completion`.
        error: what went wrong; nothing is scored then.
    """

    index: int
    token_ids: tuple[int, ...]
    base_token_ids: tuple[int, ...]
    first: int
    diagnostics: Diagnostics
    top: list[Top] | None
    weights_changed: list[Side]
    error: str | None

    @classmethod
    def of(
        cls,
        index: int,
        token_ids: tuple[int, ...],
        base_token_ids: tuple[int, ...],
        decisions: list[Decision],
        weights_changed: list[Side],
        error: str | None,
    ) -> Scores:
        return cls(
            index,
            token_ids,
            base_token_ids,
            first=len(token_ids) - len(decisions),
            diagnostics=Diagnostics.of(decisions),
            top=[d.top for d in decisions if d.top] or None,
            weights_changed=weights_changed,
            error=error,
        )


@dataclass(slots=True)
class Statistics:
    """Counts over the life of a Pair.

    Attributes:
        total_requests: completions ended, aborted ones not counted. failed_requests: ended with "error".
        total_tokens: generated tokens.
        first_token_forced: completions whose first token was forced to the teacher.
        constraint_applied: tokens drawn from the teacher's nucleus.
        teacher_fallbacks: tokens drawn from the teacher because the two supports were disjoint.
    """

    total_requests: int = 0
    failed_requests: int = 0
    total_tokens: int = 0
    first_token_forced: int = 0
    constraint_applied: int = 0
    teacher_fallbacks: int = 0

    @property
    def success_rate(self) -> float:
        """Share of total_requests that did not fail; 1 before the first."""
        if not self.total_requests:
            return 1.0
        return 1 - self.failed_requests / self.total_requests

    def count(self, finish_reason: FinishReason, decisions: list[Decision]) -> None:
        """Adds one ended completion."""
        self.total_requests += finish_reason != "abort"
        self.failed_requests += finish_reason == "error"
        self.total_tokens += len(decisions)
        self.first_token_forced += bool(decisions) and decisions[0].forced
        self.constraint_applied += sum(d.constrained for d in decisions)
        self.teacher_fallbacks += sum(d.fallback for d in decisions)

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "success_rate": self.success_rate}
