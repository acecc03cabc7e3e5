"""Decisions and drafts on whole rows of logits, NumPy or torch; knows logits and settings, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from midlogit.core.arrays import (
    Array,
    array_namespace,
    device,
    float64,
    log_sum_exp,
    resolution,
    take_columns,
    to_column,
)
from midlogit.core.draw import draw_columns, masses, most_likely
from midlogit.core.mixture import FLOAT32
from midlogit.core.nucleus import Nucleus, nucleus
from midlogit.core.outcomes import Outcomes
from midlogit.decide.base import RowSettings, group_rows
from midlogit.decide.describing import describe_groups
from midlogit.decide.rows import (
    Certificate,
    DraftedColumns,
    RawLogprobs,
    Rows,
    Sampled,
    Tempered,
    temper,
)
from midlogit.decide.sampling import sample_groups
from midlogit.outputs import Decision


def decide(base_NV: Array, teacher_NV: Array, settings: Sequence[RowSettings]) -> list[Decision]:
    """Draws one token per row pair.

    Rows that share rule, outcomes and kind of support are decided together. A row with NaN, +inf or nothing but −inf
    yields a Decision with `error` set and does not affect the others.

    Args:
        base_NV, teacher_NV: raw logits of both models for the same positions, NumPy or torch, on one device. Each row
            holds all ids that its model has; tokens are drawn from those that both have.
        settings: one per row.
    """

    def rows_of(group: list[int]) -> Rows:
        if len(group) == len(settings):
            return WholeRows.of(base_NV, teacher_NV, settings)
        return WholeRows.of(
            _take(base_NV, group), _take(teacher_NV, group), [settings[row] for row in group]
        )

    return describe_groups(sample_groups(settings, rows_of))


def draft(base_NV: Array, settings: Sequence[RowSettings], vocabulary: int) -> list[int]:
    """The token that the base drafts at each position: the very draft that `decide` accepts or rejects there.

    Args:
        base_NV: raw logits of the base. settings: one per row. vocabulary: ids drawn from are below it.
    """
    xp = array_namespace(base_NV)
    drafted: dict[int, int] = {}
    for group in group_rows(settings, lambda s: id(s.outcomes)):
        alike = [settings[row] for row in group]
        logits_NV = temper(_take(base_NV, group), alike)
        may_end_N = to_column([s.may_end for s in alike], base_NV)
        p_NV = alike[0].outcomes.apply(logits_NV, may_end_N, vocabulary)

        uniform_N = to_column([s.uniforms.draft for s in alike], base_NV)
        greedy_N = to_column([s.temperature == 0 for s in alike], base_NV)
        drawn_N = xp.where(greedy_N, most_likely(p_NV), draw_columns(masses(p_NV), uniform_N))
        drafted.update(zip(group, drawn_N.tolist(), strict=True))
    return [drafted[row] for row in range(len(settings))]


def _take(x_NV: Array, rows: list[int]) -> Array:
    xp = array_namespace(x_NV)
    return xp.take(x_NV, xp.asarray(np.asarray(rows, dtype=np.int64), device=device(x_NV)), axis=0)


@dataclass(frozen=True, slots=True)
class WholeRows(Rows):
    """Rows with the logits of every id; build with `WholeRows.of`.

    Attributes:
        base_NW, teacher_NW: logits of all ids of each model, the first `vocabulary` common; zeros in broken rows.
        base_lse_N, teacher_lse_N: log normalisers of the rows as they came, not finite in broken ones.
    """

    settings: Sequence[RowSettings]
    outcomes: Outcomes
    base_NW: Array
    teacher_NW: Array
    base_lse_N: Array
    teacher_lse_N: Array
    broken_N: Array
    vocabulary: int
    resolution: float

    @classmethod
    def of(cls, base_NW: Array, teacher_NW: Array, settings: Sequence[RowSettings]) -> WholeRows:
        xp = array_namespace(base_NW, teacher_NW)
        base_lse_N, teacher_lse_N = log_sum_exp(base_NW), log_sum_exp(teacher_NW)
        broken_N = ~(xp.isfinite(base_lse_N) & xp.isfinite(teacher_lse_N))
        if bool(broken_N.any()):
            base_NW, teacher_NW = (
                xp.where(broken_N[:, None], xp.zeros_like(x_NW), x_NW)
                for x_NW in (base_NW, teacher_NW)
            )
        return cls(
            settings=settings,
            outcomes=settings[0].outcomes,
            base_NW=base_NW,
            teacher_NW=teacher_NW,
            base_lse_N=base_lse_N,
            teacher_lse_N=teacher_lse_N,
            broken_N=broken_N,
            vocabulary=min(base_NW.shape[-1], teacher_NW.shape[-1]),
            resolution=min(resolution(base_NW), FLOAT32),
        )

    def log_weights(self) -> tuple[Array, Array]:
        may_end_N = to_column([s.may_end for s in self.settings], self.broken_N)
        base_NV, teacher_NV = (
            self.outcomes.apply(temper(x_NW, self.settings), may_end_N, self.vocabulary)
            for x_NW in (self.base_NW, self.teacher_NW)
        )
        return base_NV, teacher_NV

    @property
    def column_ids(self) -> None:
        return None

    def nucleus(self, teacher_NV: Array, top_p_N: Array) -> Nucleus:
        return nucleus(teacher_NV, top_p_N)

    def draft(self, base_NV: Array) -> DraftedColumns:
        return DraftedColumns.sample(base_NV, self.settings, self.column_ids)

    def columns_of(self, ids_N: Array) -> Array:
        return ids_N

    def ids_of(self, columns_NK: Array) -> Array:
        return columns_NK

    def emitted_stop(self) -> Array:
        return self.outcomes.emitted_stop(self.teacher_NW)

    def stop_weights(self) -> Array:
        return self.outcomes.stop_weights(temper(self.base_NW, self.settings))

    def tempered(self, ids_N: Array) -> Tempered:
        xp = array_namespace(self.base_NW)

        def of(logits_NW: Array, raw_lse_N: Array) -> tuple[Array, Array]:
            tempered_NW = temper(logits_NW, self.settings)
            lse_N = raw_lse_N if tempered_NW is logits_NW else log_sum_exp(tempered_NW)
            size = logits_NW.shape[-1]
            if all(i < size for i in self.outcomes.stop_ids):
                return float64(xp, take_columns(tempered_NW, ids_N[:, None])[:, 0]) - lse_N, lse_N
            places_N = xp.minimum(ids_N, xp.full_like(ids_N, size - 1))
            logit_N = float64(xp, take_columns(tempered_NW, places_N[:, None])[:, 0])
            return xp.where(ids_N < size, logit_N - lse_N, -xp.inf), lse_N

        base_N, base_mass_N = of(self.base_NW, self.base_lse_N)
        teacher_N, teacher_mass_N = of(self.teacher_NW, self.teacher_lse_N)
        exact_N = xp.zeros_like(base_mass_N)
        return Tempered(base_N, teacher_N, base_mass_N, teacher_mass_N, exact_N, exact_N)

    def raw_logprobs(self, columns_N: Array, outcomes_N: Array) -> RawLogprobs:
        xp = array_namespace(self.base_NW)
        found = []
        for logits_NW, lse_N in (
            (self.base_NW, self.base_lse_N),
            (self.teacher_NW, self.teacher_lse_N),
        ):
            raw_N = float64(xp, take_columns(logits_NW, columns_N[:, None])[:, 0])
            if self.outcomes.stop_outcome is not None:
                raw_N = xp.where(
                    outcomes_N == self.outcomes.stop_outcome,
                    self.outcomes.stop_mass(logits_NW),
                    raw_N,
                )
            found.append(raw_N - lse_N)
        nowhere_N = xp.zeros_like(self.broken_N)
        return RawLogprobs(found[0], found[1], nowhere_N, nowhere_N)

    def reported(self) -> tuple[Array, Array]:
        xp = array_namespace(self.base_NW)
        return (
            float64(xp, self.base_NW) - self.base_lse_N[:, None],
            float64(xp, self.teacher_NW) - self.teacher_lse_N[:, None],
        )

    def certify(self, sampled: Sampled) -> Certificate:
        """All is seen, and nothing is uncertain."""
        xp = array_namespace(sampled.alpha_N)
        exact_N = xp.zeros_like(sampled.alpha_N)
        return Certificate(xp.ones_like(sampled.alpha_N), exact_N, exact_N)
