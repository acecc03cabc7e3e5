"""The geometric mixture of two rows and its cumulant F; knows docs/theory.md sections 1 and 2, no rule for α.

Rows are log-probabilities on one alphabet, −inf where a model gives nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from midlogit.core.arrays import Array, array_namespace, device, row_max, row_sum

FLOAT32 = 2.0**-23  # its resolution
ROUNDING = 2.0**8  # error of a logit that is computed in two ways, in units of the resolution


def rounding(resolution: float, temperature: float) -> float:
    """Largest |F′| that rounding alone can produce between equal models (docs/theory.md section 4.3, (11b)).

    Args:
        resolution: of the logits' floats. temperature: 0 counts as 1.
    """
    return (ROUNDING * resolution / (temperature or 1.0)) ** 2


def normalise(logits_NV: Array) -> Array:
    """Log-probabilities of rows of logits; a row that is −inf everywhere stays so.

    The peak is subtracted first, so that a constant added to a row costs no digits of float32.
    """
    return normalise_with_mass(logits_NV)[0]


def normalise_with_mass(logits_NV: Array) -> tuple[Array, Array]:
    """`normalise`, and the log of the mass of each row in float64, −inf where there is none."""
    xp = array_namespace(logits_NV)
    peak_N = row_max(xp, logits_NV)
    shift_N = xp.where(xp.isfinite(peak_N), peak_N, 0.0)
    centred_NV = logits_NV - shift_N[:, None]
    total_N = row_sum(xp, xp.exp(centred_NV))
    log_total_N = xp.log(xp.where(total_N == 0, 1.0, total_N))
    normal_NV = centred_NV - xp.astype(log_total_N, logits_NV.dtype, copy=False)[:, None]
    return normal_NV, xp.where(total_N == 0, -xp.inf, log_total_N + shift_N)


@dataclass(frozen=True, slots=True)
class LogPair:
    """Base and teacher rows with their log ratio; build with `LogPair.of`.

    Attributes:
        base_NV, teacher_NV: log-probabilities, −inf allowed.
        common_NV: base log-probabilities on the common support, −inf elsewhere.
        ratio_NV: ℓ = log teacher − log base (docs/theory.md (3)), 0 off the common support.
        overlap_N: whether the row has a common support at all.
        rounding_N: |F′| that rounding alone can produce (`rounding`).
    """

    base_NV: Array
    teacher_NV: Array
    common_NV: Array
    ratio_NV: Array
    overlap_N: Array
    rounding_N: Array

    @classmethod
    def of(cls, base_NV: Array, teacher_NV: Array, rounding_N: Array | None = None) -> LogPair:
        """The pair of two rows of log-probabilities; without `rounding_N` they count as exact."""
        xp = array_namespace(base_NV, teacher_NV)
        both_NV = (base_NV > -xp.inf) & (teacher_NV > -xp.inf)
        ratio_NV = xp.where(both_NV, teacher_NV, 0.0) - xp.where(both_NV, base_NV, 0.0)
        common_NV = xp.where(both_NV, base_NV, -xp.inf)

        if rounding_N is None:
            rounding_N = xp.zeros(base_NV.shape[0], dtype=xp.float64, device=device(base_NV))
        return cls(base_NV, teacher_NV, common_NV, ratio_NV, xp.any(both_NV, axis=-1), rounding_N)

    def rows(self, index_N: Array) -> LogPair:
        """The pair restricted to some rows."""
        xp = array_namespace(self.base_NV)
        taken = [xp.take(getattr(self, field.name), index_N, axis=0) for field in fields(self)]
        return LogPair(*taken)


def moments(pair: LogPair, alpha_N: Array) -> tuple[Array, Array, Array]:
    """F(α), F′(α), F″(α) of each row in float64 (docs/theory.md (2), (4), (5)).

    Args:
        pair: rows, each with a common support.
        alpha_N: one α per row, float64.
    """
    xp = array_namespace(pair.base_NV)
    weight_N1 = xp.astype(alpha_N, pair.base_NV.dtype, copy=False)[:, None]

    exponent_NV = pair.common_NV + weight_N1 * pair.ratio_NV
    peak_N = row_max(xp, exponent_NV)
    mass_NV = xp.exp(exponent_NV - peak_N[:, None])
    total_N = row_sum(xp, mass_NV)
    mass_NV = mass_NV * pair.ratio_NV

    mean_N = row_sum(xp, mass_NV) / total_N
    square_N = row_sum(xp, mass_NV * pair.ratio_NV) / total_N
    variance_N = xp.maximum(square_N - mean_N**2, xp.zeros_like(mean_N))
    return xp.log(total_N) + xp.astype(peak_N, xp.float64, copy=False), mean_N, variance_N


def log_mixture(pair: LogPair, alpha_N: Array, to_teacher_N: Array) -> Array:
    """log q of each row, normalised (docs/theory.md (1)).

    Args:
        alpha_N: α of each row.
        to_teacher_N: rows that take the teacher's distribution: forced first tokens and rows without a common support.
    """
    xp = array_namespace(pair.base_NV)
    weight_N1 = xp.astype(alpha_N, pair.base_NV.dtype, copy=False)[:, None]
    mixed_NV = pair.common_NV + weight_N1 * pair.ratio_NV
    return normalise(xp.where(to_teacher_N[:, None], pair.teacher_NV, mixed_NV))
