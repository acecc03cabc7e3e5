"""From row pairs to drawn tokens: temperature, masks, stop class, support, α, draft, draw, diagnostics.

Knows the settings of each row and the core; not where logits come from or what becomes of the tokens.
The order of the steps is fixed in docs/theory.md section 5. Every token is drawn as speculation draws it: the base
drafts, and the draft stands or is replaced. So an engine may ask for drafts ahead (`draft`), and the tokens are the
same whether it does or not (docs/speculation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from midlogit.core.arrays import (
    Array,
    Namespace,
    array_namespace,
    descending_order,
    device,
    float64,
    log_sum_exp,
    resolution,
    row_max,
    row_sum,
    take_columns,
    top_k_unordered,
)
from midlogit.core.diagnostics import diagnose
from midlogit.core.draw import inverse_cdf, masses, most_likely
from midlogit.core.mixture import FLOAT32, LogPair, log_mixture, normalise, rounding
from midlogit.core.nucleus import nucleus
from midlogit.core.outcomes import Outcomes
from midlogit.core.rejection import accepted, residual
from midlogit.core.solver import solve
from midlogit.decide.base import BROKEN, EMPTY, RowSettings
from midlogit.decide.truncated.certificate import Certificate, Weights, certify, teacher_total
from midlogit.decide.truncated.rows import ServedDrafts, TopLogprobs, TruncatedRows
from midlogit.decide.truncated.single import NARROW, sample_single
from midlogit.outputs import Candidates, Decision, Top


def decide(base_NV: Array, teacher_NV: Array, settings: Sequence[RowSettings]) -> list[Decision]:
    """Draws one token for each row pair.

    Rows that share rule, outcomes and kind of support are decided together. A row with NaN, +inf or
    nothing but −inf yields a Decision with `error` set; the others are not touched by it.

    Args:
        base_NV, teacher_NV: raw logits of both models for the same positions, NumPy or torch, on one device. Each row
            holds all ids that its model has; tokens are drawn from those that both have.
        settings: one a row.
    """
    xp = array_namespace(base_NV, teacher_NV)

    def some(rows: list[int], alike: list[RowSettings]) -> Steps:
        if len(rows) == len(settings):
            return _decide_alike(xp, Columns.whole(base_NV, teacher_NV), alike)
        index_N = xp.asarray(np.asarray(rows, dtype=np.int64), device=device(base_NV))
        taken = (xp.take(x_NV, index_N, axis=0) for x_NV in (base_NV, teacher_NV))
        return _decide_alike(xp, Columns.whole(*taken), alike)

    return Drawn.together(settings, some).decisions()


def draft(base_NV: Array, settings: Sequence[RowSettings], vocabulary: int) -> list[int]:
    """The token that the base drafts at each position: the one that `decide` will find there, if it stands.

    Args:
        base_NV: raw logits of the base. settings: one a row. vocabulary: the ids drawn from are below it.
    """
    xp = array_namespace(base_NV)
    drafted: dict[int, int] = {}
    for rows in _alike(settings, lambda s: id(s.outcomes)):
        alike = [settings[row] for row in rows]
        some_NV = xp.take(base_NV, xp.asarray(np.asarray(rows, dtype=np.int64), device=device(base_NV)), axis=0)
        may_end_N = xp.asarray(np.asarray([s.may_end for s in alike]), device=device(base_NV))
        p_NV = alike[0].outcomes.apply(_temper(xp, some_NV, alike), may_end_N, vocabulary)
        uniform_N = xp.asarray(np.asarray([s.uniforms.draft for s in alike]), device=device(base_NV))
        greedy_N = xp.asarray(np.asarray([s.temperature == 0 for s in alike]), device=device(base_NV))
        drawn_N = xp.where(greedy_N, most_likely(p_NV), inverse_cdf(masses(p_NV), uniform_N))
        drafted.update(zip(rows, drawn_N.tolist(), strict=True))
    return [drafted[row] for row in range(len(settings))]


def decide_truncated(
    pairs: Sequence[tuple[TopLogprobs, TopLogprobs]], settings: Sequence[RowSettings], vocabulary: int
) -> list[Decision]:
    """`decide` for rows of which each model lists only some ids; every Decision carries its certificate.

    Args:
        pairs: (base, teacher) of each row. vocabulary: the ids drawn from are below it.
    """
    return sample_truncated(pairs, settings, vocabulary).decisions()


def sample_truncated(
    pairs: Sequence[tuple[TopLogprobs, TopLogprobs]], settings: Sequence[RowSettings], vocabulary: int
) -> Drawn:
    """`decide_truncated` in two steps: the tokens now, what is known of them when it is asked for."""

    def some(rows: list[int], alike: list[RowSettings]) -> Steps:
        may_end_N = np.asarray([s.may_end for s in alike])
        temperature_N = np.asarray([s.temperature or 1.0 for s in alike])
        seen = TruncatedRows.of([pairs[row] for row in rows], alike[0].outcomes, may_end_N, temperature_N, vocabulary)
        return _decide_alike(np, Columns.listed(seen), alike)

    if len(pairs) == 1 and max(len(one.logprobs) for one in pairs[0]) <= NARROW:
        token_id = sample_single(pairs[0], settings[0], vocabulary)
        known = [replace(settings[0], given=token_id)]
        return Drawn([token_id], lambda: Drawn.together(known, some).decisions())
    return Drawn.together(settings, some)


Steps = Generator[tuple[Array, Array], None, list[Decision]]  # (drawn ids, rows where none could be), then Decisions


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of some rows.

    Attributes:
        token_ids: the id drawn for each row; None where nothing could be.
        decisions: makes all that is known of each row; to be called once.
    """

    token_ids: list[int | None]
    decisions: Callable[[], list[Decision]]

    @classmethod
    def together(cls, settings: Sequence[RowSettings], some: Callable[[list[int], list[RowSettings]], Steps]) -> Drawn:
        """Draws for groups that share rule, outcomes, kind of support and the rest."""
        groups = _alike(
            settings, lambda s: (s.rule, id(s.outcomes), s.top_p is None, s.alpha_tol, s.top_logprobs, s.given is None)
        )
        running = [(rows, some(rows, [settings[row] for row in rows])) for rows in groups]
        token_ids: list[int | None] = [None] * len(settings)
        for rows, steps in running:
            for row, token, empty in zip(rows, *(x_N.tolist() for x_N in next(steps)), strict=True):
                token_ids[row] = None if empty else token

        def decisions() -> list[Decision]:
            found: dict[int, Decision] = {}
            for rows, steps in running:
                try:
                    next(steps)
                except StopIteration as end:
                    found.update(zip(rows, end.value, strict=True))
            return [found[row] for row in range(len(found))]

        return cls(token_ids, decisions)


def _alike(settings: Sequence[RowSettings], key: Callable[[RowSettings], object]) -> list[list[int]]:
    """The rows of each group that shares a key."""
    groups: dict[object, list[int]] = {}
    for row, s in enumerate(settings):
        groups.setdefault(key(s), []).append(row)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class Columns:
    """Both models' rows, whose first columns are common.

    Attributes:
        base_NV, teacher_NV: logits of all ids of each model, or log-probabilities when listed.
        vocabulary: how many columns are common.
        base_lse_N, teacher_lse_N: what turns them into log-probabilities.
        ids_NV: the id of each column; None when column and id are the same.
        seen: what was listed and what not; None for whole rows.
    """

    base_NV: Array
    teacher_NV: Array
    vocabulary: int
    base_lse_N: Array
    teacher_lse_N: Array
    ids_NV: Array | None = None
    seen: TruncatedRows | None = None

    @classmethod
    def whole(cls, base_NV: Array, teacher_NV: Array) -> Columns:
        vocabulary = min(base_NV.shape[-1], teacher_NV.shape[-1])
        return cls(base_NV, teacher_NV, vocabulary, log_sum_exp(base_NV), log_sum_exp(teacher_NV))

    @classmethod
    def listed(cls, seen: TruncatedRows) -> Columns:
        nothing_N = np.zeros(len(seen.ids_NU))
        base_NU, teacher_NU = seen.base.values_NU, seen.teacher.values_NU
        return cls(base_NU, teacher_NU, base_NU.shape[-1], nothing_N, nothing_N, seen.ids_NU, seen)

    def zeroed(self, rows_N: Array) -> Columns:
        """The same with zeros in some rows."""
        xp = array_namespace(self.base_NV)
        base_NV, teacher_NV = (
            xp.where(rows_N[:, None], xp.zeros_like(x_NV), x_NV) for x_NV in (self.base_NV, self.teacher_NV)
        )
        return replace(self, base_NV=base_NV, teacher_NV=teacher_NV)

    def effective(self, logits_NV: Array, outcomes: Outcomes, may_end_N: Array) -> Array:
        """Tempered logits of one model over the outcomes of the common columns."""
        if self.seen is None:
            return outcomes.apply(logits_NV, may_end_N, self.vocabulary)
        return outcomes.apply_to_columns(logits_NV, self.seen.drawable_NU, self.seen.ids_NU)

    def column_of(self, ids_N: Array) -> Array:
        return ids_N if self.ids_NV is None else np.argmax(self.ids_NV == ids_N[:, None], axis=-1)

    def id_of(self, columns_N: Array) -> Array:
        return columns_N if self.ids_NV is None else take_columns(self.ids_NV, columns_N[:, None])[:, 0]

    def raw_logprobs(self, drawn_N: Array, outcome_N: Array, outcomes: Outcomes) -> tuple[Array, Array, Array, Array]:
        """Both models' own log-probabilities of what was drawn, and where they are only upper bounds.

        Args:
            drawn_N: its column. outcome_N: its id, that of the class where a stop was drawn.
        """
        xp = array_namespace(self.base_NV)
        lead = outcomes.stop_outcome
        if self.seen is not None:
            members_NU = self.seen.ids_NU == outcome_N[:, None]
            if lead is not None:
                members_NU |= (outcome_N == lead)[:, None] & outcomes.stop_columns(self.seen.ids_NU)
            base, teacher = (side.raw_logprobs(members_NU) for side in (self.seen.base, self.seen.teacher))
            return base[0], teacher[0], base[1], teacher[1]

        found = []
        for logits_NV, lse_N in ((self.base_NV, self.base_lse_N), (self.teacher_NV, self.teacher_lse_N)):
            raw_N = xp.astype(take_columns(logits_NV, drawn_N[:, None])[:, 0], xp.float64)
            if lead is not None:
                raw_N = xp.where(outcome_N == lead, outcomes.stop_mass(logits_NV), raw_N)
            found.append(raw_N - lse_N)
        return found[0], found[1], xp.zeros_like(drawn_N), xp.zeros_like(drawn_N)

    def reported(self) -> tuple[Array, Array]:
        """Log-probabilities of both models as far as they are known, −inf elsewhere."""
        if self.seen is not None:
            base, teacher = self.seen.base, self.seen.teacher
            hidden = -np.inf
            return (
                np.where(base.known_NU, base.values_NU, hidden),
                np.where(teacher.known_NU, teacher.values_NU, hidden),
            )
        xp = array_namespace(self.base_NV)
        return (
            xp.astype(self.base_NV, xp.float64) - self.base_lse_N[:, None],
            xp.astype(self.teacher_NV, xp.float64) - self.teacher_lse_N[:, None],
        )


def _decide_alike(xp: Namespace, columns: Columns, rows: list[RowSettings]) -> Steps:
    """`decide` for rows that share rule, outcomes, kind of support and the rest of what `Drawn` groups by.

    Nothing that the draw does not need comes before the `yield`.
    """
    rule, outcomes, tolerance, top_k = rows[0].rule, rows[0].outcomes, rows[0].alpha_tol, rows[0].top_logprobs
    constrained = rows[0].top_p is not None
    base_lse_N, teacher_lse_N = columns.base_lse_N, columns.teacher_lse_N

    def column(values: list[float] | list[int] | list[bool]) -> Array:
        return xp.asarray(np.asarray(values), device=device(base_lse_N))

    # A raw normaliser that is not finite gives the row away: it is drawn from harmless zeros and reported.
    broken_N = ~(xp.isfinite(base_lse_N) & xp.isfinite(teacher_lse_N))
    if bool(broken_N.any()):
        columns = columns.zeroed(broken_N)
    base_NV, teacher_NV, ids_NV, seen = columns.base_NV, columns.teacher_NV, columns.ids_NV, columns.seen

    may_end_N, forced_N = column([s.may_end for s in rows]), column([s.forced for s in rows])
    p_NV, t_NV = (columns.effective(_temper(xp, x_NV, rows), outcomes, may_end_N) for x_NV in (base_NV, teacher_NV))
    mixed, support = (p_NV, t_NV), None

    top_p_N = column([s.top_p or 1.0 for s in rows])
    if constrained:
        support = nucleus(t_NV, top_p_N, None if seen is None else teacher_total(seen))
        columns_NK, valid_NK = support
        hidden = -xp.inf
        p_NV = xp.where(valid_NK, float64(xp, take_columns(p_NV, columns_NK)), hidden)
        t_NV = xp.where(valid_NK, float64(xp, take_columns(t_NV, columns_NK)), hidden)
    empty_N = row_max(xp, t_NV) == -xp.inf
    finest = FLOAT32 if seen is not None else min(resolution(base_NV), FLOAT32)
    rounding_N = column([rounding(finest, s.temperature) for s in rows])
    base_log_NV, teacher_log_NV = (normalise(float64(xp, x_NV)) for x_NV in (p_NV, t_NV))
    pair = LogPair.of(base_log_NV, teacher_log_NV, rounding_N)

    fallback_N = ~pair.overlap_N & ~forced_N
    to_teacher_N = forced_N | fallback_N
    alpha_N = xp.ones_like(base_lse_N)
    solve_N = xp.nonzero(~to_teacher_N & ~empty_N)[0]
    if solve_N.shape[0] == len(rows):
        alpha_N = solve(rule, pair, tolerance)
    elif solve_N.shape[0]:
        alpha_N[solve_N] = solve(rule, pair.rows(solve_N), tolerance)
    log_q_NV = log_mixture(pair, alpha_N, to_teacher_N)
    if rows[0].given is None:
        served = None if seen is None else ServedDrafts.of(seen, [s.draft for s in rows])
        drawn_N = _draw(xp, log_q_NV, support, mixed[0], served, rows)
    else:
        drawn_N = columns.column_of(column([outcomes.outcome_of(s.given) for s in rows if s.given is not None]))
    logprob_N = _at(xp, log_q_NV, support, drawn_N)
    outcome_N = token_N = columns.id_of(drawn_N)
    if outcomes.stop_outcome is not None:
        token_N = xp.where(token_N == outcomes.stop_outcome, outcomes.emitted_stop(teacher_NV, ids_NV), token_N)
    yield token_N, empty_N

    facts = diagnose(log_q_NV, pair.base_NV, pair.teacher_NV)
    if seen is None:
        certificate = Certificate(xp.ones_like(alpha_N), xp.zeros_like(alpha_N), xp.zeros_like(alpha_N))
    else:
        weights = Weights.of(seen, seen.base), Weights.of(seen, seen.teacher)
        certificate = certify(seen, weights, rule, alpha_N, ~to_teacher_N & ~empty_N, mixed, support, top_p_N)
    raw_base_N, raw_teacher_N, base_bounded_N, teacher_bounded_N = columns.raw_logprobs(drawn_N, outcome_N, outcomes)

    tops: list[Top | None] = [None] * len(rows)
    if top_k:
        q_ids_NK = ids_NV
        if support is not None:
            q_ids_NK = support[0] if ids_NV is None else take_columns(ids_NV, support[0])
        base_row_NV, teacher_row_NV = columns.reported()
        q_top = _top(log_q_NV, top_k, q_ids_NK)
        base_top, teacher_top = (_top(row_NV, top_k, ids_NV) for row_NV in (base_row_NV, teacher_row_NV))
        tops = [Top(*three) for three in zip(q_top, base_top, teacher_top, strict=True)]

    # One transfer for all numbers of the step.
    numbers = (
        alpha_N, facts.kl_base_N, facts.kl_teacher_N, facts.entropy_N, facts.ess_base_N, facts.ess_teacher_N,
        logprob_N, raw_base_N, raw_teacher_N, certificate.coverage_N, certificate.alpha_bound_N, certificate.tv_bound_N,
        token_N, fallback_N, broken_N, empty_N, base_bounded_N, teacher_bounded_N,
    )  # fmt: skip
    table_NC = xp.stack([xp.astype(x, xp.float64) for x in numbers], axis=1).tolist()
    return [_decision(values, settings, top) for values, settings, top in zip(table_NC, rows, tops, strict=True)]


def _decision(values: list[float], settings: RowSettings, top: Top | None) -> Decision:
    """A row of the table as a Decision."""
    alpha, kl_base, kl_teacher, entropy, ess_base, ess_teacher, logprob, base, teacher, *rest = values
    coverage, alpha_bound, bound, token, fallback, broken, empty, base_bounded, teacher_bounded = rest
    error = None
    if broken:
        error = BROKEN
    elif empty:
        error = EMPTY
    return Decision(
        token_id=int(token),
        alpha=alpha,
        kl_base=kl_base,
        kl_teacher=kl_teacher,
        entropy=entropy,
        ess_base=ess_base,
        ess_teacher=ess_teacher,
        logprob=logprob,
        base_logprob=base,
        teacher_logprob=teacher,
        forced=settings.forced,
        fallback=bool(fallback) and error is None,
        constrained=settings.top_p is not None,
        coverage=coverage,
        alpha_bound=alpha_bound,
        tv_bound=bound,
        base_bounded=bool(base_bounded),
        teacher_bounded=bool(teacher_bounded),
        top=top,
        error=error,
    )


def _draw(
    xp: Namespace,
    log_q_NV: Array,
    support: tuple[Array, Array] | None,
    base_NV: Array,
    served: ServedDrafts | None,
    rows: list[RowSettings],
) -> Array:
    """The drawn column of each row: the base's draft where it stands, else one of the residual.

    Args:
        log_q_NV: log q, over the columns of the support if there is one. base_NV: what the base drafts from.
        served: the drafts of rows for which they were made elsewhere.
    """
    draft_uniform_N, accept_uniform_N, redraw_uniform_N = (
        xp.asarray(np.asarray(uniforms), device=device(log_q_NV))
        for uniforms in zip(*(s.uniforms for s in rows), strict=True)
    )
    greedy = [s.temperature == 0 for s in rows]
    if all(greedy):
        return _column_of(support, most_likely(log_q_NV))
    draft_NV = masses(base_NV)
    total_N = row_sum(xp, draft_NV)
    total_N = xp.where(total_N > 0, total_N, xp.ones_like(total_N))
    drafted_N = inverse_cdf(draft_NV, draft_uniform_N)
    weight_N = xp.astype(take_columns(draft_NV, drafted_N[:, None])[:, 0], xp.float64) / total_N
    if served is not None:
        drafted_N = np.where(served.served_N, served.columns_N, drafted_N)
        weight_N = np.where(served.served_N, served.weight_N, weight_N)
        draft_NV = np.where(served.served_N[:, None], served.law_NU, draft_NV)
        total_N = np.where(served.served_N, 1.0, total_N)
    stands_N = accepted(xp.exp(_at(xp, log_q_NV, support, drafted_N)), weight_N, accept_uniform_N)
    rejected_K = xp.nonzero(~stands_N)[0]
    if rejected_K.shape[0]:
        log_q_KV, draft_KV = (xp.take(x_NV, rejected_K, axis=0) for x_NV in (log_q_NV, draft_NV))
        if support is not None:
            draft_KV = take_columns(draft_KV, xp.take(support[0], rejected_K, axis=0))
        total_K1 = xp.take(total_N, rejected_K)[:, None]
        rest_KV = residual(xp.exp(log_q_KV), xp.astype(draft_KV, xp.float64, copy=False) / total_K1)
        redrawn_N = xp.zeros_like(drafted_N)
        redrawn_N[rejected_K] = inverse_cdf(rest_KV, xp.take(redraw_uniform_N, rejected_K))
        drafted_N = xp.where(stands_N, drafted_N, _column_of(support, redrawn_N))
    if any(greedy):
        greedy_N = xp.asarray(np.asarray(greedy), device=device(log_q_NV))
        drafted_N = xp.where(greedy_N, _column_of(support, most_likely(log_q_NV)), drafted_N)
    return drafted_N


def _column_of(support: tuple[Array, Array] | None, places_N: Array) -> Array:
    """The columns of places in the support."""
    return places_N if support is None else take_columns(support[0], places_N[:, None])[:, 0]


def _at(xp: Namespace, log_q_NV: Array, support: tuple[Array, Array] | None, columns_N: Array) -> Array:
    """log q of one column of each row, −inf off the support."""
    if support is None:
        return take_columns(log_q_NV, columns_N[:, None])[:, 0]
    found_NK = (support[0] == columns_N[:, None]) & support[1]
    return xp.max(xp.where(found_NK, log_q_NV, xp.full_like(log_q_NV, -xp.inf)), axis=-1)


def _temper(xp: Namespace, logits_NV: Array, rows: list[RowSettings]) -> Array:
    """Logits over temperature; greedy rows are solved at temperature 1."""
    if all(s.temperature in (0, 1) for s in rows):
        return logits_NV
    temperatures = np.asarray([s.temperature or 1.0 for s in rows])
    scale_N = xp.astype(xp.asarray(1 / temperatures, device=device(logits_NV)), logits_NV.dtype)
    return logits_NV * scale_N[:, None]


def _top(log_probs_NV: Array, k: int, ids_NV: Array | None = None) -> list[Candidates]:
    """The k most likely of each row as (id, log-probability), most likely first; fewer if fewer have mass."""
    columns_NK = top_k_unordered(log_probs_NV, min(k, log_probs_NV.shape[-1]))
    values_NK = take_columns(log_probs_NV, columns_NK)
    order_NK = descending_order(values_NK)
    columns_NK, values_NK = take_columns(columns_NK, order_NK), take_columns(values_NK, order_NK)
    ids_NK = columns_NK if ids_NV is None else take_columns(ids_NV, columns_NK)
    return [
        [(i, v) for i, v in zip(ids, values, strict=True) if v > -np.inf]
        for ids, values in zip(ids_NK.tolist(), values_NK.tolist(), strict=True)
    ]
