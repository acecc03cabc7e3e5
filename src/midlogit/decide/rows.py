"""The interface between rows and sampling; knows no models and no servers.

Two kinds of rows exist: whole rows of logits (`decide/arrays.py`) and top-k lists (`decide/truncated/rows.py`).
Shapes: N rows, V columns common to both models, K columns of a support.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from midlogit.core.arrays import Array, array_namespace, device, float64, row_sum, take_columns
from midlogit.core.draw import draw_columns, masses
from midlogit.core.mixture import LogPair
from midlogit.core.nucleus import Nucleus
from midlogit.core.outcomes import Outcomes
from midlogit.decide.base import RowSettings


class Rows(ABC):
    """Base and teacher rows of N positions on common columns, with their settings.

    Attributes:
        settings: one per row; all share what `sampling_key` holds.
        outcomes: the alphabet of all rows.
        broken_N: rows whose logits cannot be normalised; they are sampled as if all logits were zero.
        resolution: relative spacing of the logits' floats, at most that of float32.
    """

    settings: Sequence[RowSettings]
    outcomes: Outcomes
    broken_N: Array
    resolution: float

    @abstractmethod
    def log_weights(self) -> tuple[Array, Array]:
        """Log weights of base and teacher [N, V]: tempered, masked, stop class merged; −inf for what is not drawn."""

    @property
    @abstractmethod
    def column_ids(self) -> Array | None:
        """The id of each column [N, V], negative for none; None where the columns are all ids in order."""

    @abstractmethod
    def nucleus(self, teacher_NV: Array, top_p_N: Array) -> Nucleus:
        """The teacher's nucleus.

        Args:
            teacher_NV: its log weights. top_p_N: the mass to reach.
        """

    @abstractmethod
    def draft(self, base_NV: Array) -> DraftedColumns:
        """Drafts one token per row from the base.

        Args:
            base_NV: its log weights.
        """

    @abstractmethod
    def columns_of(self, ids_N: Array) -> Array:
        """The column of one id per row."""

    @abstractmethod
    def ids_of(self, columns_NK: Array) -> Array:
        """The ids of some columns of each row."""

    @abstractmethod
    def emitted_stop(self) -> Array:
        """The teacher's most likely stop id, which a drawn stop class emits unless the base's conditional decides."""

    @abstractmethod
    def stop_weights(self) -> Array:
        """The base's tempered log weights of the members of the merged stop class, in the order of `stop_ids`."""

    @abstractmethod
    def raw_logprobs(self, columns_N: Array, outcomes_N: Array) -> RawLogprobs:
        """Both models' own log-probabilities of one outcome per row, given its column and id."""

    @abstractmethod
    def tempered(self, ids_N: Array) -> Tempered:
        """Log-probabilities of one id per row under both whole models at the temperature, unmasked."""

    @abstractmethod
    def reported(self) -> tuple[Array, Array]:
        """Raw log-probabilities of base and teacher where they are known, −inf elsewhere."""

    @abstractmethod
    def certify(self, sampled: Sampled) -> Certificate:
        """Bounds on the distance of what was sampled from the exact q*."""


class DraftedColumns(NamedTuple):
    """One draft per row and the distribution D it was drawn from.

    Attributes:
        columns_N: columns of the drafts. prob_N: D of each; 0 for a draft that is in no column, which is rejected.
        mass_NV: D of every column, times total_N.
    """

    columns_N: Array
    prob_N: Array
    mass_NV: Array
    total_N: Array

    @classmethod
    def sample(
        cls, base_NV: Array, settings: Sequence[RowSettings], ids_NV: Array | None
    ) -> DraftedColumns:
        """Drafts from the base's log weights.

        Args:
            ids_NV: as `Rows.column_ids`.
        """
        xp = array_namespace(base_NV)
        uniform_N = xp.asarray(
            np.asarray([s.uniforms.draft for s in settings]), device=device(base_NV)
        )
        mass_NV = masses(base_NV)
        total_N = row_sum(xp, mass_NV)
        total_N = xp.where(total_N > 0, total_N, xp.ones_like(total_N))
        columns_N = draw_columns(mass_NV, uniform_N, ids_NV)
        prob_N = float64(xp, take_columns(mass_NV, columns_N[:, None])[:, 0]) / total_N
        return cls(columns_N, prob_N, mass_NV, total_N)


class RawLogprobs(NamedTuple):
    """Raw log-probabilities of an outcome per row, and where each is only an upper bound."""

    base_N: Array
    teacher_N: Array
    base_bounded_N: Array
    teacher_bounded_N: Array


class Tempered(NamedTuple):
    """Log-probabilities of an id per row under both whole tempered models (docs/theory.md (20a)).

    Attributes:
        base_N, teacher_N: −inf where the model lacks the id.
        base_mass_N, teacher_mass_N: log of the mass of all ids, on the scale of `Rows.log_weights`.
        base_bound_N, teacher_bound_N: bounds on the error of base_N and teacher_N.
    """

    base_N: Array
    teacher_N: Array
    base_mass_N: Array
    teacher_mass_N: Array
    base_bound_N: Array
    teacher_bound_N: Array


class Certificate(NamedTuple):
    """Bounds on the distance of each row's sampled distribution from the exact q*.

    Attributes:
        coverage_N: mass of the reported ids, of the model that reported less.
        alpha_bound_N: bound on |α − α*|. tv_bound_N: bound on the total variation.
    """

    coverage_N: Array
    alpha_bound_N: Array
    tv_bound_N: Array


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of N rows, and what was computed to draw them.

    Attributes:
        rows: the rows sampled from.
        log_weights: of base and teacher, before any support constraint.
        support: the teacher's nucleus, None without the constraint.
        pair: log-probabilities of both models on the support.
        support_masses: log of their masses there, on the scale of `log_weights`.
        alpha_N: α of each row. solved_N: rows where the rule chose it; the others take the teacher as it is.
        fallback_N: rows without a common support. empty_N: rows where nothing can be drawn.
        log_q_NV: log q on the support.
        columns_N: the drawn columns. outcomes_N: their ids, that of the merged class for a stop.
        tokens_N: the drawn ids, a member of the merged class for a stop.
    """

    rows: Rows
    log_weights: tuple[Array, Array]
    support: Nucleus | None
    pair: LogPair
    support_masses: tuple[Array, Array]
    alpha_N: Array
    solved_N: Array
    fallback_N: Array
    empty_N: Array
    log_q_NV: Array
    columns_N: Array
    outcomes_N: Array
    tokens_N: Array


def temper(logits_NV: Array, settings: Sequence[RowSettings]) -> Array:
    """Logits over temperature; greedy rows are solved at temperature 1."""
    if all(s.temperature in (0, 1) for s in settings):
        return logits_NV
    xp = array_namespace(logits_NV)
    inv_temperature = 1 / np.asarray([s.temperature or 1.0 for s in settings])
    inv_temperature_N = xp.astype(
        xp.asarray(inv_temperature, device=device(logits_NV)), logits_NV.dtype
    )
    return logits_NV * inv_temperature_N[:, None]
