"""Token ids from rows: support, α, draft, draw.

Knows rows and their settings; not which kind of rows, where they come from or what becomes of the tokens. The order of
the steps is fixed in docs/theory.md section 5. Every token is drawn by rejection sampling: the base drafts, and the
draft is accepted or replaced. An engine may therefore ask for drafts ahead of time, and gets the same tokens either
way (docs/speculation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from midlogit.core.arrays import (
    Array,
    array_namespace,
    float64,
    row_max,
    take_columns,
    to_column,
)
from midlogit.core.draw import draw_columns, gumbel_max, masses, most_likely
from midlogit.core.mixture import LogPair, log_mixture, normalise_with_mass, rounding
from midlogit.core.nucleus import Nucleus
from midlogit.core.rejection import accepted, residual
from midlogit.core.solver import solve
from midlogit.decide.base import RowSettings, group_rows, sampling_key
from midlogit.decide.rows import Rows, Sampled

Groups = list[
    tuple[list[int], Sampled]
]  # numbers of rows that were sampled together, and what was sampled


def sample_groups(settings: Sequence[RowSettings], rows_of: Callable[[list[int]], Rows]) -> Groups:
    """Samples all rows, in groups that share `sampling_key`.

    Args:
        rows_of: makes the rows with these numbers.
    """
    return [(group, sample(rows_of(group))) for group in group_rows(settings, sampling_key)]


def sample(rows: Rows) -> Sampled:
    """Draws one token per row; `describing.py` computes everything that the draw does not need."""
    settings, outcomes = rows.settings, rows.outcomes
    xp = array_namespace(rows.broken_N)

    # The distributions to mix: both models on the teacher's nucleus, or on all outcomes.
    log_weights = rows.log_weights()
    support = None
    if settings[0].top_p is not None:
        top_p_N = to_column([s.top_p or 1.0 for s in settings], rows.broken_N)
        support = rows.nucleus(log_weights[1], top_p_N)
    pair, support_masses, empty_N = _restrict(rows, log_weights, support)

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
    if given:
        tokens_N = to_column([s.given for s in settings if s.given is not None], rows.broken_N)
    elif outcomes.stop_outcome is not None:
        tokens_N = xp.where(outcomes_N == outcomes.stop_outcome, _stop_ids(rows), outcomes_N)

    return Sampled(
        rows=rows,
        log_weights=log_weights,
        support=support,
        pair=pair,
        support_masses=support_masses,
        alpha_N=alpha_N,
        solved_N=solved_N,
        fallback_N=fallback_N,
        empty_N=empty_N,
        log_q_NV=log_q_NV,
        columns_N=columns_N,
        outcomes_N=outcomes_N,
        tokens_N=tokens_N,
    )


def _stop_ids(rows: Rows) -> Array:
    """The id that a drawn stop class emits in each row."""
    if not rows.outcomes.draws_stop_id:
        return rows.emitted_stop()
    xp = array_namespace(rows.broken_N)
    ending_N, greedy_N, stop_ids_K = (
        to_column(x, rows.broken_N)
        for x in (
            [s.uniforms.ending for s in rows.settings],
            [s.temperature == 0 for s in rows.settings],
            rows.outcomes.stop_ids,
        )
    )
    log_weights_NK = rows.stop_weights()
    drawn_N = gumbel_max(masses(log_weights_NK), ending_N, stop_ids_K[None, :])
    return stop_ids_K[xp.where(greedy_N, most_likely(log_weights_NK), drawn_N)]


def _restrict(
    rows: Rows, log_weights: tuple[Array, Array], support: Nucleus | None
) -> tuple[LogPair, tuple[Array, Array], Array]:
    """Both models' log-probabilities on the support, their masses there, and the rows where nothing has mass."""
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
    (base_NV, base_mass_N), (teacher_NV, teacher_mass_N) = (
        normalise_with_mass(float64(xp, x_NV)) for x_NV in (base_NV, teacher_NV)
    )
    pair = LogPair.of(base_NV, teacher_NV, rounding_N)
    return pair, (base_mass_N, teacher_mass_N), empty_N


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
        xp.exp(on_support((log_q_NV,), support, draft.columns_N)[0]),
        draft.prob_N,
        accept_uniform_N,
    )

    columns_N = draft.columns_N
    rejected_K = xp.nonzero(~accepted_N)[0]
    if rejected_K.shape[0]:
        redraw_uniform_N = to_column([s.uniforms.redraw for s in settings], log_q_NV)
        log_q_KV, mass_KV = (
            xp.take(x_NV, rejected_K, axis=0) for x_NV in (log_q_NV, draft.mass_NV)
        )
        ids_NV = rows.column_ids
        if support is not None:
            ids_NV = rows.ids_of(support.columns_NK)
            mass_KV = take_columns(mass_KV, xp.take(support.columns_NK, rejected_K, axis=0))
        ids_KV = None if ids_NV is None else xp.take(ids_NV, rejected_K, axis=0)
        draft_KV = float64(xp, mass_KV) / xp.take(draft.total_N, rejected_K)[:, None]
        rest_KV = residual(xp.exp(log_q_KV), draft_KV)

        places_N = xp.zeros_like(columns_N)
        places_N[rejected_K] = draw_columns(rest_KV, xp.take(redraw_uniform_N, rejected_K), ids_KV)
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


def on_support(
    rows: Sequence[Array], support: Nucleus | None, columns_N: Array
) -> tuple[Array, ...]:
    """The entry of one column per row in each of some arrays, −inf off the support.

    Args:
        rows: arrays of rows on the support.
    """
    if support is None:
        return tuple(take_columns(log_NV, columns_N[:, None])[:, 0] for log_NV in rows)
    xp = array_namespace(columns_N)
    found_NK = (support.columns_NK == columns_N[:, None]) & support.valid_NK
    return tuple(xp.max(xp.where(found_NK, log_NK, -xp.inf), axis=-1) for log_NK in rows)
