"""Decisions of tokens that are drawn: everything that is reported of a row, and nothing that the draw needs.

Knows what was sampled; not which kind of rows, nor how it was drawn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from midlogit.core.arrays import (
    Array,
    array_namespace,
    descending_order,
    row_max,
    take_columns,
    to_column,
    top_k_unordered,
)
from midlogit.core.diagnostics import diagnose
from midlogit.core.mixture import normalise_with_mass
from midlogit.decide.base import BROKEN, EMPTY, RowSettings
from midlogit.decide.rows import Rows, Sampled
from midlogit.decide.sampling import Groups, on_support
from midlogit.outputs import Candidates, Decision, Top


class Described(NamedTuple):
    """What is computed of the rows of a group, one array each, and then of one row; names as in `Decision`."""

    token_id: Any
    alpha: Any
    kl_base: Any
    kl_teacher: Any
    entropy: Any
    ess_base: Any
    ess_teacher: Any
    logprob: Any
    base_logprob: Any
    teacher_logprob: Any
    base_tempered_logprob: Any
    teacher_tempered_logprob: Any
    base_support_logprob: Any
    teacher_support_logprob: Any
    base_support_logmass: Any
    teacher_support_logmass: Any
    fallback: Any
    broken: Any
    empty: Any
    coverage: Any
    alpha_bound: Any
    tv_bound: Any
    base_bounded: Any
    teacher_bounded: Any
    base_tempered_bound: Any
    teacher_tempered_bound: Any


def describe_groups(groups: Groups) -> list[Decision]:
    """The Decisions of all rows, in the order of their numbers."""
    found: dict[int, Decision] = {}
    for group, sampled in groups:
        found.update(zip(group, describe(sampled), strict=True))
    return [found[row] for row in range(len(found))]


def describe(sampled: Sampled) -> list[Decision]:
    """Computes the diagnostics of sampled rows; waits for the device once."""
    rows = sampled.rows
    xp = array_namespace(sampled.alpha_N)

    facts = diagnose(sampled.log_q_NV, sampled.pair.base_NV, sampled.pair.teacher_NV)
    certificate = rows.certify(sampled)
    raw = rows.raw_logprobs(sampled.columns_N, sampled.outcomes_N)
    tempered = rows.tempered(sampled.tokens_N)
    pair = sampled.pair
    base_in_N, teacher_in_N, logprob_N = on_support(
        (pair.base_NV, pair.teacher_NV, sampled.log_q_NV), sampled.support, sampled.columns_N
    )
    if rows.outcomes.draws_stop_id:
        logprob_N = logprob_N + _stop_log_share(sampled)

    columns = Described(
        token_id=sampled.tokens_N,
        alpha=sampled.alpha_N,
        kl_base=facts.kl_base_N,
        kl_teacher=facts.kl_teacher_N,
        entropy=facts.entropy_N,
        ess_base=facts.ess_base_N,
        ess_teacher=facts.ess_teacher_N,
        logprob=logprob_N,
        base_logprob=raw.base_N,
        teacher_logprob=raw.teacher_N,
        base_tempered_logprob=tempered.base_N,
        teacher_tempered_logprob=tempered.teacher_N,
        base_support_logprob=base_in_N,
        teacher_support_logprob=teacher_in_N,
        base_support_logmass=sampled.support_masses[0] - tempered.base_mass_N,
        teacher_support_logmass=sampled.support_masses[1] - tempered.teacher_mass_N,
        fallback=sampled.fallback_N,
        broken=rows.broken_N,
        empty=sampled.empty_N,
        coverage=certificate.coverage_N,
        alpha_bound=certificate.alpha_bound_N,
        tv_bound=certificate.tv_bound_N,
        base_bounded=raw.base_bounded_N,
        teacher_bounded=raw.teacher_bounded_N,
        base_tempered_bound=tempered.base_bound_N,
        teacher_tempered_bound=tempered.teacher_bound_N,
    )
    table_NC = xp.stack([xp.astype(x, xp.float64) for x in columns], axis=1).tolist()
    return [
        _decision(row, s, top, support)
        for row, s, top, support in zip(
            map(Described._make, table_NC),
            rows.settings,
            _tops(sampled),
            _supports(sampled),
            strict=True,
        )
    ]


def _stop_log_share(sampled: Sampled) -> Array:
    """log of the base's share of the stop class that each row's token has (docs/theory.md (20b)); 0 for others."""
    rows = sampled.rows
    xp = array_namespace(sampled.alpha_N)
    weights_NK = rows.stop_weights()
    log_share_NK, mass_N = normalise_with_mass(weights_NK)
    first_NK = xp.zeros_like(weights_NK)
    first_NK[:, 1:] = -xp.inf
    log_share_NK = xp.where((mass_N > -xp.inf)[:, None], log_share_NK, first_NK)
    own_NK = sampled.tokens_N[:, None] == to_column(rows.outcomes.stop_ids, rows.broken_N)[None, :]
    return xp.where(
        xp.any(own_NK, axis=-1), row_max(xp, xp.where(own_NK, log_share_NK, -xp.inf)), 0.0
    )


def _supports(sampled: Sampled) -> list[list[int]] | list[None]:
    """The ids of each row's support in id order, with all members of a stop class; None where not asked for."""
    rows, support = sampled.rows, sampled.support
    if support is None or not rows.settings[0].return_support:
        return [None] * len(rows.settings)
    outcomes = rows.outcomes
    ids_NK, valid_NK = rows.ids_of(support.columns_NK).tolist(), support.valid_NK.tolist()
    found = [
        [i for i, inside in zip(*row, strict=True) if inside]
        for row in zip(ids_NK, valid_NK, strict=True)
    ]
    return [
        sorted({*ids, *outcomes.stop_ids}) if outcomes.stop_outcome in ids else ids for ids in found
    ]


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


def _decision(
    row: Described, settings: RowSettings, top: Top | None, support: list[int] | None
) -> Decision:
    """One row of the table as a Decision."""
    error = None
    if row.broken:
        error = BROKEN
    elif row.empty:
        error = EMPTY
    return Decision(  # by position, which takes two thirds of the time
        int(row.token_id),
        row.alpha,
        row.kl_base,
        row.kl_teacher,
        row.entropy,
        row.ess_base,
        row.ess_teacher,
        row.logprob,
        row.base_logprob,
        row.teacher_logprob,
        row.base_tempered_logprob,
        row.teacher_tempered_logprob,
        row.base_support_logprob,
        row.teacher_support_logprob,
        row.base_support_logmass,
        row.teacher_support_logmass,
        settings.forced,
        bool(row.fallback) and error is None,
        settings.top_p is not None,
        row.coverage,
        row.alpha_bound,
        row.tv_bound,
        bool(row.base_bounded),
        bool(row.teacher_bounded),
        row.base_tempered_bound,
        row.teacher_tempered_bound,
        top,
        support,
        error,
    )
