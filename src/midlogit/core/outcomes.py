"""The alphabet of a request: masked ids and the merged stop class; knows ids, not tokenizers or text.

docs/theory.md sections 5 and 6: temper each model, then mask, then merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from midlogit.core.arrays import Array, Namespace, array_namespace, device, float64, log_sum_exp

StopId = Literal["teacher", "base"]

KEPT_ROWS = 128  # boolean rows kept, which are up to two per alphabet


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The alphabet that a request draws from.

    Attributes:
        masked_ids: never drawn; both models are renormalised without them (docs/theory.md (13)).
        stop_ids: every id that ends a sequence for either model; with `merge` the first is the class's column, so both
            models have it, and others may lie beyond one model's vocabulary.
        merge: count `stop_ids` as one outcome (docs/theory.md (14)); otherwise each is an outcome of its own.
        stop_token_ids: ordinary ids that end this request; never merged.
        stop_id: which id a drawn stop class emits: the teacher's most likely, or one drawn from the base's own
            conditional (docs/theory.md (20b)).
    """

    masked_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    merge: bool = True
    stop_token_ids: tuple[int, ...] = ()
    stop_id: StopId = "teacher"

    @property
    def merged(self) -> bool:
        return self.merge and len(self.stop_ids) > 1

    @property
    def draws_stop_id(self) -> bool:
        """Whether the id of a drawn stop class is drawn from the base's own conditional."""
        return self.merged and self.stop_id == "base"

    @property
    def stop_outcome(self) -> int | None:
        """The column of the merged stop class, None when nothing is merged."""
        return self.stop_ids[0] if self.merged else None

    @cached_property
    def merged_stops(self) -> frozenset[int]:
        """The members of the merged stop class; none when nothing is merged."""
        return frozenset(self.stop_ids if self.merged else ())

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """Ids that end the sequence when drawn; masked until min_tokens is reached."""
        return self.stop_ids + self.stop_token_ids

    @cached_property
    def ending(self) -> frozenset[int]:
        """`ending_ids` as a set."""
        return frozenset(self.ending_ids)

    @cached_property
    def masked(self) -> frozenset[int]:
        """`masked_ids` as a set."""
        return frozenset(self.masked_ids)

    @cached_property
    def masked_before_end(self) -> frozenset[int]:
        """Ids that are not drawn while the sequence may not end."""
        return self.masked | self.ending

    def outcome_of(self, token_id: int) -> int:
        """The column that a token counts for: its own, or that of the merged stop class."""
        return self.stop_ids[0] if self.merged and token_id in self.stop_ids else token_id

    def apply(self, logits_NW: Array, may_end_N: Array, vocabulary: int) -> Array:
        """Tempered logits of the ids that may be drawn, with the stop class summed into its column.

        Args:
            logits_NW: tempered logits of all ids that the model has, W at least `vocabulary`.
            may_end_N: rows that may end now; the others have every ending id masked.
            vocabulary: ids below it are drawn from.

        Returns:
            [N, vocabulary], masked ids at −inf.
        """
        xp, where = array_namespace(logits_NW), device(logits_NW)
        all_may_end = bool(xp.all(may_end_N))

        logits_NV = logits_NW[:, :vocabulary]
        masked_1V = _boolean_row(self._without_column, vocabulary, xp, where)
        merged_NV = xp.where(masked_1V, xp.full_like(logits_NV, -xp.inf), logits_NV)

        if self.stop_outcome is not None:
            merged_NV[:, self.stop_outcome] = xp.astype(self.stop_mass(logits_NW), logits_NV.dtype)

        if not all_may_end:
            ending_1V = _boolean_row(self.ending, vocabulary, xp, where)
            merged_NV = xp.where(
                may_end_N[:, None] | ~ending_1V, merged_NV, xp.full_like(merged_NV, -xp.inf)
            )
        return merged_NV

    def stop_mass(self, logits_NW: Array) -> Array:
        """log of the summed mass of the stop class."""
        xp = array_namespace(logits_NW)
        return log_sum_exp(xp.take(logits_NW, self._stop_columns(logits_NW), axis=-1))

    def emitted_stop(self, teacher_NW: Array) -> Array:
        """The id that ends a sequence of each row: the teacher's most likely stop id.

        Args:
            teacher_NW: its logits of all ids that it has.
        """
        xp = array_namespace(teacher_NW)
        ids_K = self._stop_columns(teacher_NW)
        return xp.take(ids_K, xp.argmax(xp.take(teacher_NW, ids_K, axis=-1), axis=-1))

    def stop_weights(self, logits_NW: Array) -> Array:
        """The logits of the members of the stop class, in the order of `stop_ids`; −inf for those the model lacks.

        Args:
            logits_NW: tempered logits of all ids that the model has.

        Returns:
            [N, K] in float64.
        """
        xp, size = array_namespace(logits_NW), logits_NW.shape[-1]
        ids = np.asarray(self.stop_ids)
        ids_K, has_K = (
            xp.asarray(x, device=device(logits_NW)) for x in (np.minimum(ids, size - 1), ids < size)
        )
        logits_NK = float64(xp, xp.take(logits_NW, ids_K, axis=-1))
        return xp.where(has_K[None, :], logits_NK, xp.full_like(logits_NK, -xp.inf))

    @cached_property
    def _without_column(self) -> frozenset[int]:
        """Masked ids, and the members of the stop class that its column counts for."""
        return self.masked | set(self.stop_ids[1:] if self.merged else ())

    def _stop_columns(self, logits_NW: Array) -> Array:
        """The stop ids that the model of these logits has."""
        xp = array_namespace(logits_NW)
        ids = [i for i in self.stop_ids if i < logits_NW.shape[-1]]
        return xp.asarray(np.asarray(ids, dtype=np.int64), device=device(logits_NW))


@lru_cache(maxsize=KEPT_ROWS)
def _boolean_row(ids: frozenset[int], size: int, xp: Namespace, where: Any) -> Array:
    """Which of `size` columns are in a set of ids, [1, size] on a device."""
    row_V = np.zeros(size, dtype=bool)
    row_V[[i for i in ids if i < size]] = True
    return xp.asarray(row_V[None, :], device=where)
