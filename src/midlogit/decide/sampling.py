"""Token ids from rows, then their Decisions: support, α, draft, draw, diagnostics.

Knows rows and their settings; not which kind of rows, where they come from or what becomes of the tokens. The order of
the steps is fixed in docs/theory.md section 5. Every token is drawn by rejection sampling: the base drafts, and the
draft is accepted or replaced. An engine may therefore ask for drafts ahead of time, and gets the same tokens either
way (docs/speculation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from midlogit.core.arrays import (
    Array,
    array_namespace,
    descending_order,
    float64,
    row_max,
    take_columns,
    to_column,
    top_k_unordered,
)
from midlogit.core.diagnostics import diagnose
from midlogit.core.draw import inverse_cdf, most_likely
from midlogit.core.mixture import LogPair, log_mixture, normalise, rounding
from midlogit.core.nucleus import Nucleus
from midlogit.core.rejection import accepted, residual
from midlogit.core.solver import solve
from midlogit.decide.base import BROKEN, EMPTY, RowSettings, group_rows, sampling_key
from midlogit.decide.rows import Rows, Sampled
from midlogit.outputs import Candidates, Decision, Top

Groups = list[
    tuple[list[int], Sampled]
]  # numbers of rows that were sampled together, and what was sampled


def sample_groups(settings: Sequence[RowSettings], rows_of: Callable[[list[int]], Rows]) -> Groups:
    """Samples all rows, in groups that share `sampling_key`.

    Args:
        rows_of: makes the rows with these numbers.
    """
    return [(group, sample(rows_of(group))) for group in group_rows(settings, sampling_key)]


def describe_groups(groups: Groups) -> list[Decision]:
    """The Decisions of all rows, in the order of their numbers."""
    found: dict[int, Decision] = {}
    for group, sampled in groups:
        found.update(zip(group, describe(sampled), strict=True))
    return [found[row] for row in range(len(found))]


def sample(rows: Rows) -> Sampled:
    """Draws one token per row. `describe` computes everything that the draw does not need."""
    settings, outcomes = rows.settings, rows.outcomes
    xp = array_namespace(rows.broken_N)

    # The distributions to mix: both models on the teacher's nucleus, or on all outcomes.
    log_weights = rows.log_weights()
    support = None
    if settings[0].top_p is not None:
        top_p_N = to_column([s.top_p or 1.0 for s in settings], rows.broken_N)
        support = rows.nucleus(log_weights[1], top_p_N)
    pair, empty_N = _restrict(rows, log_weights, support)

    # α and q; forced rows and rows without a common support take the teacher's distribution.
    forced_N = to_column([s.forced for s in settings], rows.broken_N)
    fallback_N = ~pair.overlap_N & ~forced_N
    to_teacher_N = forced_N | fallback_N
    solved_N = ~to_teacher_N & ~empty_N
    alpha_N = _alpha(settings[0], pair, solved_N)
    log_q_NV = log_mixture(pair, alpha_N, to_teacher_N)

    # The token: given, or the base's draft if accepted, or its replacement.
    given = [outcomes.outcome_of(s.given) for s in settings if s.given is not None]
    if given:
        columns_N = rows.columns_of(to_column(given, rows.broken_N))
    else:
        columns_N = _draw(rows, log_q_NV, support, log_weights[0])
    outcomes_N = tokens_N = rows.ids_of(columns_N[:, None])[:, 0]
    if outcomes.stop_outcome is not None:
        tokens_N = xp.where(outcomes_N == outcomes.stop_outcome, rows.emitted_stop(), outcomes_N)

    return Sampled(
        rows=rows,
        log_weights=log_weights,
        support=support,
        pair=pair,
        alpha_N=alpha_N,
        solved_N=solved_N,
        fallback_N=fallback_N,
        empty_N=empty_N,
        log_q_NV=log_q_NV,
        columns_N=columns_N,
        outcomes_N=outcomes_N,
        tokens_N=tokens_N,
    )


def describe(sampled: Sampled) -> list[Decision]:
    """Computes the diagnostics of sampled rows; waits for the device once."""
    rows = sampled.rows
    xp = array_namespace(sampled.alpha_N)

    facts = diagnose(sampled.log_q_NV, sampled.pair.base_NV, sampled.pair.teacher_NV)
    certificate = rows.certify(sampled)
    raw = rows.raw_logprobs(sampled.columns_N, sampled.outcomes_N)
    logprob_N = _log_q_at(sampled.log_q_NV, sampled.support, sampled.columns_N)
    tops = _tops(sampled)

    numbers = (
        sampled.alpha_N, facts.kl_base_N, facts.kl_teacher_N, facts.entropy_N, facts.ess_base_N, facts.ess_teacher_N,
        logprob_N, raw.base_N, raw.teacher_N,
        certificate.coverage_N, certificate.alpha_bound_N, certificate.tv_bound_N,
        sampled.tokens_N, sampled.fallback_N, rows.broken_N, sampled.empty_N, raw.base_bounded_N, raw.teacher_bounded_N,
    )  # fmt: skip
    table_NC = xp.stack([xp.astype(x, xp.float64) for x in numbers], axis=1).tolist()
    return [
        _decision(values, s, top)
        for values, s, top in zip(table_NC, rows.settings, tops, strict=True)
    ]


def _restrict(
    rows: Rows, log_weights: tuple[Array, Array], support: Nucleus | None
) -> tuple[LogPair, Array]:
    """Both models' log-probabilities on the support, and the rows where nothing has mass."""
    base_NV, teacher_NV = log_weights
    xp = array_namespace(base_NV)
    if support is not None:
        base_NV, teacher_NV = (
            xp.where(support.valid_NK, float64(xp, take_columns(x_NV, support.columns_NK)), -xp.inf)
            for x_NV in (base_NV, teacher_NV)
        )
    empty_N = row_max(xp, teacher_NV) == -xp.inf
    rounding_N = to_column(
        [rounding(rows.resolution, s.temperature) for s in rows.settings], base_NV
    )
    base_NV, teacher_NV = (normalise(float64(xp, x_NV)) for x_NV in (base_NV, teacher_NV))
    return LogPair.of(base_NV, teacher_NV, rounding_N), empty_N


def _alpha(settings: RowSettings, pair: LogPair, solved_N: Array) -> Array:
    """α of each row, 1 where it is not solved for.

    Args:
        settings: rule and tolerance of all rows.
    """
    xp = array_namespace(solved_N)
    solved_K = xp.nonzero(solved_N)[0]
    if solved_K.shape[0] == solved_N.shape[0]:
        return solve(settings.rule, pair, settings.alpha_tol)
    alpha_N = xp.ones_like(pair.rounding_N)
    if solved_K.shape[0]:
        alpha_N[solved_K] = solve(settings.rule, pair.rows(solved_K), settings.alpha_tol)
    return alpha_N


def _draw(rows: Rows, log_q_NV: Array, support: Nucleus | None, base_NV: Array) -> Array:
    """The drawn column of each row: the base's draft if accepted, else a column of the residual.

    Args:
        log_q_NV: log q on the support. base_NV: the base's log weights, which it drafts from.
    """
    settings = rows.settings
    xp = array_namespace(log_q_NV)
    greedy = [s.temperature == 0 for s in settings]
    if all(greedy):
        return _columns_of(support, most_likely(log_q_NV))

    draft = rows.draft(base_NV)
    accept_uniform_N = to_column([s.uniforms.accept for s in settings], log_q_NV)
    accepted_N = accepted(
        xp.exp(_log_q_at(log_q_NV, support, draft.columns_N)), draft.prob_N, accept_uniform_N
    )

    columns_N = draft.columns_N
    rejected_K = xp.nonzero(~accepted_N)[0]
    if rejected_K.shape[0]:
        redraw_uniform_N = to_column([s.uniforms.redraw for s in settings], log_q_NV)
        log_q_KV, mass_KV = (
            xp.take(x_NV, rejected_K, axis=0) for x_NV in (log_q_NV, draft.mass_NV)
        )
        if support is not None:
            mass_KV = take_columns(mass_KV, xp.take(support.columns_NK, rejected_K, axis=0))
        draft_KV = float64(xp, mass_KV) / xp.take(draft.total_N, rejected_K)[:, None]
        rest_KV = residual(xp.exp(log_q_KV), draft_KV)

        places_N = xp.zeros_like(columns_N)
        places_N[rejected_K] = inverse_cdf(rest_KV, xp.take(redraw_uniform_N, rejected_K))
        columns_N = xp.where(accepted_N, columns_N, _columns_of(support, places_N))

    if any(greedy):
        greedy_N = to_column(greedy, log_q_NV)
        columns_N = xp.where(greedy_N, _columns_of(support, most_likely(log_q_NV)), columns_N)
    return columns_N


def _columns_of(support: Nucleus | None, places_N: Array) -> Array:
    """The columns of places in the support."""
    return (
        places_N if support is None else take_columns(support.columns_NK, places_N[:, None])[:, 0]
    )


def _log_q_at(log_q_NV: Array, support: Nucleus | None, columns_N: Array) -> Array:
    """log q of one column per row, −inf off the support."""
    if support is None:
        return take_columns(log_q_NV, columns_N[:, None])[:, 0]
    xp = array_namespace(log_q_NV)
    found_NK = (support.columns_NK == columns_N[:, None]) & support.valid_NK
    return xp.max(xp.where(found_NK, log_q_NV, xp.full_like(log_q_NV, -xp.inf)), axis=-1)


def _tops(sampled: Sampled) -> list[Top] | list[None]:
    """The most likely candidates of each row, None where none are asked for."""
    rows, support = sampled.rows, sampled.support
    k = rows.settings[0].top_logprobs
    if not k:
        return [None] * len(rows.settings)
    base_NV, teacher_NV = rows.reported()
    columns_NK, values_NK = _most_likely(sampled.log_q_NV, k)
    if support is not None:
        columns_NK = take_columns(support.columns_NK, columns_NK)
    of_q = _candidates(rows, columns_NK, values_NK)
    of_base, of_teacher = (
        _candidates(rows, *_most_likely(row_NV, k)) for row_NV in (base_NV, teacher_NV)
    )
    return [Top(*three) for three in zip(of_q, of_base, of_teacher, strict=True)]


def _most_likely(log_probs_NV: Array, k: int) -> tuple[Array, Array]:
    """The k most likely columns of each row and their log-probabilities, most likely first."""
    columns_NK = top_k_unordered(log_probs_NV, min(k, log_probs_NV.shape[-1]))
    values_NK = take_columns(log_probs_NV, columns_NK)
    order_NK = descending_order(values_NK)
    return take_columns(columns_NK, order_NK), take_columns(values_NK, order_NK)


def _candidates(rows: Rows, columns_NK: Array, values_NK: Array) -> list[Candidates]:
    """Columns as (id, log-probability), without those that have no mass."""
    return [
        [(i, v) for i, v in zip(ids, values, strict=True) if v > -np.inf]
        for ids, values in zip(rows.ids_of(columns_NK).tolist(), values_NK.tolist(), strict=True)
    ]


def _decision(values: list[float], settings: RowSettings, top: Top | None) -> Decision:
    """One row of the table of `describe` as a Decision."""
    alpha, kl_base, kl_teacher, entropy, ess_base, ess_teacher, logprob, base, teacher, *rest = (
        values
    )
    (
        coverage,
        alpha_bound,
        tv_bound,
        token,
        fallback,
        broken,
        empty,
        base_bounded,
        teacher_bounded,
    ) = rest
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
        tv_bound=tv_bound,
        base_bounded=bool(base_bounded),
        teacher_bounded=bool(teacher_bounded),
        top=top,
        error=error,
    )
