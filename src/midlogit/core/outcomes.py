"""Which ids are outcomes of the mixture: masks and the merged stop class; knows ids, no tokenizer and no text.

docs/theory.md sections 5 and 6: temper each model, then mask, then merge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from midlogit.core.arrays import Array, Namespace, array_namespace, device, log_sum_exp


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The alphabet that a request draws from.

    Attributes:
        masked_ids: never drawn; both models are renormalised without them (docs/theory.md (13)).
        stop_ids: every id that ends a sequence for either model; with `merge` the first stands for all, so both models
            have it, and others may lie beyond one model's vocabulary.
        merge: count `stop_ids` as one outcome (docs/theory.md (14)); otherwise each stands alone.
        stop_token_ids: ordinary ids that end this request; never merged.
    """

    masked_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    merge: bool = True
    stop_token_ids: tuple[int, ...] = ()
    _masks: dict[object, Any] = field(default_factory=dict, repr=False)

    @property
    def merged(self) -> bool:
        return self.merge and len(self.stop_ids) > 1

    @property
    def stop_outcome(self) -> int | None:
        """The column that stands for the merged stop class, None when nothing is merged."""
        return self.stop_ids[0] if self.merged else None

    @cached_property
    def merged_stops(self) -> frozenset[int]:
        """The members of the merged stop class; none when nothing is merged."""
        return frozenset(self.stop_ids if self.merged else ())

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """Ids that end the sequence when drawn; held back while min_tokens is not reached."""
        return self.stop_ids + self.stop_token_ids

    @cached_property
    def ending(self) -> frozenset[int]:
        """`ending_ids` as a set."""
        return frozenset(self.ending_ids)

    def outcome_of(self, token_id: int) -> int:
        """The column that a token counts for: its own, or that of the merged stop class."""
        return self.stop_ids[0] if self.merged and token_id in self.stop_ids else token_id

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Ids that are never drawn."""
        return frozenset(self.masked_ids)

    @cached_property
    def hidden_before_end(self) -> frozenset[int]:
        """Ids that are not drawn while the sequence may not end."""
        return self.hidden | set(self.ending_ids)

    def apply(self, logits_NW: Array, ending_N: Array, vocabulary: int) -> Array:
        """Tempered logits of the ids that may be drawn, with the stop class summed into its column.

        Args:
            logits_NW: tempered logits of all ids that the model has, W at least `vocabulary`.
            ending_N: rows that may end now; the others have every ending id masked.
            vocabulary: ids below it are drawn from.

        Returns:
            [N, vocabulary], masked ids at −inf.
        """
        xp = array_namespace(logits_NW)
        logits_NV = logits_NW[:, :vocabulary]
        ending_NV = None if bool(xp.all(ending_N)) else ending_N[:, None] | ~self._mask(xp, logits_NV, "ending")
        merged_NV = xp.where(self._mask(xp, logits_NV, "masked"), xp.full_like(logits_NV, -xp.inf), logits_NV)
        if self.stop_outcome is not None:
            stop_N = log_sum_exp(xp.take(logits_NW, self._index(xp, logits_NW), axis=-1))
            merged_NV[:, self.stop_outcome] = xp.astype(stop_N, logits_NV.dtype)
        if ending_NV is not None:
            merged_NV = xp.where(ending_NV, merged_NV, xp.full_like(merged_NV, -xp.inf))
        return merged_NV

    def emitted_stop(self, teacher_NV: Array, ids_NV: Array | None = None) -> Array:
        """The id that ends a sequence of each row: the teacher's most likely stop id.

        Args:
            teacher_NV: its logits of all ids that it has, or of given ones.
            ids_NV: the id of each column, −1 for none; None when column and id are the same.
        """
        xp = array_namespace(teacher_NV)
        if ids_NV is not None:
            likeliest_N = np.argmax(np.where(self.stop_columns(ids_NV), teacher_NV, -np.inf), axis=-1)
            return np.take_along_axis(ids_NV, likeliest_N[:, None], axis=-1)[:, 0]
        index_K = self._index(xp, teacher_NV)
        return xp.take(index_K, xp.argmax(xp.take(teacher_NV, index_K, axis=-1), axis=-1))

    def stop_mass(self, log_probs_NV: Array) -> Array:
        """log of the summed mass of the stop class."""
        xp = array_namespace(log_probs_NV)
        return log_sum_exp(xp.take(log_probs_NV, self._index(xp, log_probs_NV), axis=-1))

    def drawable(self, ids_NV: Array, ending_N: Array) -> Array:
        """Which columns of given ids may be drawn, the members of the stop class among them (NumPy)."""
        ending_NV = ending_N[:, None] | ~self._among(ids_NV, "ending")
        return (ids_NV >= 0) & ending_NV & ~self._among(ids_NV, "masked")

    def stop_columns(self, ids_NV: Array) -> Array:
        """Which columns of given ids belong to the merged stop class (NumPy)."""
        return self._among(ids_NV, "stop")

    def stops_beyond(self, vocabulary: int) -> tuple[int, ...]:
        """The members of the merged stop class that only the model with more ids than `vocabulary` has."""
        return tuple(i for i in self.merged_stops if i >= vocabulary)

    def hidden_count(self, may_end: bool, vocabulary: int) -> int:
        """How many ids below `vocabulary` may not be drawn."""
        key = ("count", may_end, vocabulary)
        if key not in self._masks:
            self._masks[key] = sum(i < vocabulary for i in (self.hidden if may_end else self.hidden_before_end))
        return int(self._masks[key])

    def _among(self, ids_NV: Array, kind: str) -> Array:
        if ("ids", kind) not in self._masks:
            members = {
                "masked": self.masked_ids,
                "ending": self.ending_ids,
                "stop": self.merged_stops,
            }[kind]
            row_V = np.zeros(2 + max(members, default=0), dtype=bool)
            row_V[list(members)] = True
            self._masks["ids", kind] = row_V
        row_V = self._masks["ids", kind]
        return row_V[np.minimum(ids_NV, len(row_V) - 1)]  # the last entry, False, is also where −1 points

    def apply_to_columns(self, logits_NV: Array, drawable_NV: Array, ids_NV: Array) -> Array:
        """`apply` for columns of given ids (NumPy).

        Args:
            drawable_NV: `drawable` of the ids. ids_NV: the id of each column, −1 for none.
        """
        merged_NV = np.where(drawable_NV, logits_NV, -np.inf)
        if self.stop_outcome is not None:
            stops_NV = self.stop_columns(ids_NV)
            stop_N1 = log_sum_exp(np.where(stops_NV, merged_NV, -np.inf))[:, None]
            merged_NV = np.where(stops_NV, np.where(ids_NV == self.stop_outcome, stop_N1, -np.inf), merged_NV)
        return merged_NV

    def _index(self, xp: Namespace, logits_NW: Array) -> Array:
        """The stop ids that the model of these logits has."""
        ids = [i for i in self.stop_ids if i < logits_NW.shape[-1]]
        return xp.asarray(np.asarray(ids, dtype=np.int64), device=device(logits_NW))

    def _mask(self, xp: Namespace, like_NV: Array, kind: str) -> Array:
        """The boolean row of masked or of ending ids, made once for each vocabulary size and device."""
        key = (kind, like_NV.shape[-1], str(device(like_NV)), xp.__name__)
        if key not in self._masks:
            hidden = set(self.ending_ids) if kind == "ending" else set(self.masked_ids)
            if kind == "masked" and self.merged:
                hidden |= set(self.stop_ids[1:])
            row_V = np.zeros(like_NV.shape[-1], dtype=bool)
            row_V[[i for i in hidden if i < row_V.size]] = True
            self._masks[key] = xp.asarray(row_V[None, :], device=device(like_NV))
        return self._masks[key]
