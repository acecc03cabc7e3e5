"""Decisions on rows of which a server lists only some ids; knows lists of log-probabilities, no server.

docs/theory.md section 10. Arrays are NumPy: N rows, U columns for the ids of either list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from midlogit.core.arrays import Array, log_sum_exp, row_max, row_sum, take_columns
from midlogit.core.bounds import LOG_ZERO, log_or_tiny, unlisted_weight
from midlogit.core.mixture import FLOAT32
from midlogit.core.nucleus import Nucleus, nucleus
from midlogit.core.outcomes import Outcomes
from midlogit.decide.base import RowSettings
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
from midlogit.decide.sampling import Groups, sample_groups
from midlogit.decide.truncated.certificate import Weights, certify
from midlogit.decide.truncated.lists import num_masked, stops_beyond
from midlogit.decide.truncated.sides import Columns, ListPair, Side, make_sides
from midlogit.decide.truncated.single import MAX_SCALAR_IDS, sample_single
from midlogit.outputs import Decision


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Token ids now, their Decisions when asked for.

    Attributes:
        token_ids: the id drawn for each row; None where nothing can be drawn.
        decisions: computes the Decision of each row.
    """

    token_ids: list[int | None]
    decisions: Callable[[], list[Decision]]


def decide_truncated(
    pairs: Sequence[ListPair], settings: Sequence[RowSettings], vocabulary: int
) -> list[Decision]:
    """Draws one token per row from lists of log-probabilities; every Decision has its certificate.

    Args:
        pairs: base and teacher of each row. settings: one per row. vocabulary: ids below it are drawn from.
    """
    return sample_truncated(pairs, settings, vocabulary).decisions()


def sample_truncated(
    pairs: Sequence[ListPair], settings: Sequence[RowSettings], vocabulary: int
) -> SampledTokens:
    """`decide_truncated` in two steps: the tokens now, the Decisions when asked for."""
    if len(pairs) == 1 and max(len(one.logprobs) for one in pairs[0]) <= MAX_SCALAR_IDS:
        token_id = sample_single(pairs[0], settings[0], vocabulary)
        known = [replace(settings[0], given=token_id)]
        return SampledTokens(
            [token_id], lambda: describe_groups(_sample_groups(pairs, known, vocabulary))
        )

    groups = _sample_groups(pairs, settings, vocabulary)
    token_ids: list[int | None] = [None] * len(settings)
    for group, sampled in groups:
        for row, token, empty in zip(
            group, sampled.tokens_N.tolist(), sampled.empty_N.tolist(), strict=True
        ):
            token_ids[row] = None if empty else token
    return SampledTokens(token_ids, lambda: describe_groups(groups))


def _sample_groups(
    pairs: Sequence[ListPair], settings: Sequence[RowSettings], vocabulary: int
) -> Groups:
    def rows_of(group: list[int]) -> Rows:
        return TruncatedRows.of(
            [pairs[row] for row in group], [settings[row] for row in group], vocabulary
        )

    return sample_groups(settings, rows_of)


@dataclass(frozen=True, slots=True)
class TruncatedRows(Rows):
    """N rows of two truncated lists on common columns; build with `TruncatedRows.of`.

    Attributes:
        base, teacher: each model's log-probabilities on the columns, and what it did not list.
        inv_temperature_N: 1 / temperature. vocabulary: ids below it are drawn from.
    """

    settings: Sequence[RowSettings]
    outcomes: Outcomes
    columns: Columns
    base: Side
    teacher: Side
    may_end_N: Array
    inv_temperature_N: Array
    vocabulary: int
    broken_N: Array
    resolution: float = FLOAT32

    @classmethod
    def of(
        cls, pairs: Sequence[ListPair], settings: Sequence[RowSettings], vocabulary: int
    ) -> TruncatedRows:
        outcomes = settings[0].outcomes
        may_end_N = np.asarray([s.may_end for s in settings])
        columns = Columns.of(pairs, outcomes, may_end_N, vocabulary)
        base, teacher = make_sides(pairs, columns)
        return cls(
            settings=settings,
            outcomes=outcomes,
            columns=columns,
            base=base,
            teacher=teacher,
            may_end_N=may_end_N,
            inv_temperature_N=1 / np.asarray([s.temperature or 1.0 for s in settings]),
            vocabulary=vocabulary,
            broken_N=np.zeros(len(settings), dtype=bool),
        )

    def log_weights(self) -> tuple[Array, Array]:
        base_NU, teacher_NU = (
            self._merged(temper(side.values_NU, self.settings))
            for side in (self.base, self.teacher)
        )
        return base_NU, teacher_NU

    def _merged(self, log_NU: Array) -> Array:
        """`Outcomes.apply` for the columns of these rows."""
        log_NU = np.where(self.columns.drawable_NU, log_NU, -np.inf)
        if self.outcomes.stop_outcome is None:
            return log_NU
        total_N = log_sum_exp(np.where(self.columns.stops_NU, log_NU, -np.inf))
        return self.columns.merge_stops(log_NU, total_N, -np.inf)

    def nucleus(self, teacher_NV: Array, top_p_N: Array) -> Nucleus:
        """The mass that is not listed counts as if every unlisted id were at the cap."""
        known_NU = self.teacher.known_NU & self.columns.drawable_NU
        log_NU, peak_N = self._scaled(self.teacher, known_NU)
        least_N, most_N = self._unlisted(self.teacher, known_NU, peak_N)
        unlisted_N = np.where(self.inv_temperature_N >= 1, most_N, least_N)
        total_N = (
            log_or_tiny(row_sum(np, np.exp(log_NU)) + unlisted_N) + peak_N * self.inv_temperature_N
        )
        return nucleus(teacher_NV, top_p_N, total_N)

    @property
    def column_ids(self) -> Array:
        return self.columns.ids_NU

    def draft(self, base_NV: Array) -> DraftedColumns:
        """The server's draft where there is one, with the stop class summed as the outcomes are; else one of ours."""
        ours = DraftedColumns.sample(base_NV, self.settings, self.column_ids)
        drafts = [s.draft for s in self.settings]
        if not any(drafts):
            return ours

        ids_NU = self.columns.ids_NU
        probs_NU = np.array(
            [
                [0.0] * len(ids) if draft is None else [draft.probs.get(i, 0.0) for i in ids]
                for draft, ids in zip(drafts, ids_NU.tolist(), strict=True)
            ]
        )
        if self.outcomes.stop_outcome is not None:
            stop_N = np.where(self.columns.stops_NU, probs_NU, 0.0).sum(axis=-1)
            probs_NU = self.columns.merge_stops(probs_NU, stop_N, 0.0)
        drafted = [
            -2 if draft is None else self.outcomes.outcome_of(draft.token_id) for draft in drafts
        ]
        found_NU = ids_NU == np.array(drafted)[:, None]

        served_N = np.array([draft is not None for draft in drafts])
        return DraftedColumns(
            columns_N=np.where(served_N, found_NU.argmax(axis=-1), ours.columns_N),
            prob_N=np.where(served_N, np.where(found_NU, probs_NU, 0.0).sum(axis=-1), ours.prob_N),
            mass_NV=np.where(served_N[:, None], probs_NU, ours.mass_NV),
            total_N=np.where(served_N, 1.0, ours.total_N),
        )

    def columns_of(self, ids_N: Array) -> Array:
        return np.argmax(self.columns.ids_NU == ids_N[:, None], axis=-1)

    def ids_of(self, columns_NK: Array) -> Array:
        return take_columns(self.columns.ids_NU, columns_NK)

    def emitted_stop(self) -> Array:
        likeliest_N = np.argmax(
            np.where(self.columns.stops_NU, self.teacher.values_NU, -np.inf), axis=-1
        )
        return self.ids_of(likeliest_N[:, None])[:, 0]

    def stop_weights(self) -> Array:
        members_NKU = (
            self.columns.ids_NU[:, None, :] == np.array(self.outcomes.stop_ids)[None, :, None]
        )
        base_NU = temper(self.base.values_NU, self.settings)
        return np.where(members_NKU, base_NU[:, None, :], -np.inf).max(axis=-1)

    def tempered(self, ids_N: Array) -> Tempered:
        own_NU = self.columns.union_NU == ids_N[:, None]
        base, teacher = (
            side.tempered(ids_N, own_NU, self.inv_temperature_N)
            for side in (self.base, self.teacher)
        )
        return Tempered(base[0], teacher[0], base[1], teacher[1], base[2], teacher[2])

    def raw_logprobs(self, columns_N: Array, outcomes_N: Array) -> RawLogprobs:
        members_NU = self.columns.ids_NU == outcomes_N[:, None]
        if self.outcomes.stop_outcome is not None:
            members_NU |= (outcomes_N == self.outcomes.stop_outcome)[
                :, None
            ] & self.columns.stops_NU
        base_N, base_bounded_N = self.base.raw_logprobs(members_NU)
        teacher_N, teacher_bounded_N = self.teacher.raw_logprobs(members_NU)
        return RawLogprobs(base_N, teacher_N, base_bounded_N, teacher_bounded_N)

    def reported(self) -> tuple[Array, Array]:
        return self.base.reported_NU, self.teacher.reported_NU

    def certify(self, sampled: Sampled) -> Certificate:
        coverage_N = np.clip(1.0 - np.maximum(self.base.mass_N, self.teacher.mass_N), 0.0, 1.0)
        return certify(sampled, self._weights(self.base), self._weights(self.teacher), coverage_N)

    def _weights(self, side: Side) -> Weights:
        """Boxes of one model's weights (docs/theory.md (21), (22))."""
        columns = self.columns
        known_NU = side.known_NU & columns.drawable_NU
        log_NU, peak_N = self._scaled(side, known_NU)
        least_N, most_N = self._unlisted(side, known_NU, peak_N)
        cap_N = np.minimum((side.cap_N * np.exp(-peak_N)) ** self.inv_temperature_N, most_N)
        low_NU = np.maximum(log_NU, LOG_ZERO)
        high_NU = np.where(side.missing_NU, log_or_tiny(cap_N)[:, None], low_NU)

        if self.outcomes.stop_outcome is not None:
            stops_NU = columns.stops_NU
            low_N = np.where(stops_NU, np.exp(low_NU), 0.0).sum(axis=-1)
            high_N = low_N + np.minimum((side.missing_NU & stops_NU).sum(axis=-1) * cap_N, most_N)
            masked_NU = columns.lead_NU & ~columns.drawable_NU
            low_NU, high_NU = (
                np.where(masked_NU, LOG_ZERO, columns.merge_stops(x_NU, log_or_tiny(x_N), LOG_ZERO))
                for x_N, x_NU in ((low_N, low_NU), (high_N, high_NU))
            )
            # All members of a class of which none is listed are one unlisted outcome.
            unlisted_N = ~stops_NU.any(axis=-1)
            cap_N = np.where(
                unlisted_N, np.minimum(cap_N * len(self.outcomes.stop_ids), most_N), cap_N
            )

        total_N = np.exp(low_NU).sum(axis=-1)
        return Weights(
            low_NU, high_NU, total_N, least_N, most_N, cap_N, peak_N * self.inv_temperature_N
        )

    def _scaled(self, side: Side, known_NU: Array) -> tuple[Array, Array]:
        """log of the tempered weights of known outcomes, relative to the largest, −∞ elsewhere; and log of that."""
        values_NU = np.where(known_NU, side.values_NU, -np.inf)
        peak_N = row_max(np, values_NU)
        peak_N = np.where(np.isfinite(peak_N), peak_N, 0.0)
        return (values_NU - peak_N[:, None]) * self.inv_temperature_N[:, None], peak_N

    def _unlisted(self, side: Side, known_NU: Array, peak_N: Array) -> tuple[Array, Array]:
        """Least and most that unlisted outcomes weigh together, on the scale of `Weights`."""
        listed_N = side.known_NU.sum(axis=-1)
        counts = (num_masked(self.outcomes, may_end, self.vocabulary) for may_end in (True, False))
        masked_N = np.where(self.may_end_N, *counts) + side.sizes_N - self.vocabulary
        beyond_B = np.array(stops_beyond(self.outcomes, self.vocabulary))
        if beyond_B.size:
            masked_N = masked_N - np.where(
                self.may_end_N, (beyond_B < side.sizes_N[:, None]).sum(axis=-1), 0
            )
        masked_N = np.maximum(masked_N - (listed_N - known_NU.sum(axis=-1)), 0)
        allowed_N = np.maximum(side.sizes_N - listed_N - masked_N, 0)

        scale_N = np.exp(-peak_N)
        return unlisted_weight(
            side.mass_N * scale_N, side.cap_N * scale_N, allowed_N, masked_N, self.inv_temperature_N
        )
