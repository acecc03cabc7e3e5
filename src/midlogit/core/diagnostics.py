"""Diagnostics of a row of q: both KLs, entropy, effective sample sizes; knows rows, not how q was found."""

from __future__ import annotations

from dataclasses import dataclass

from midlogit.core.arrays import Array, array_namespace, log_sum_exp, row_sum


@dataclass(frozen=True, slots=True)
class RowDiagnostics:
    """Diagnostics [N], divergences and entropy in nats (docs/theory.md (6), (18), (19))."""

    kl_base_N: Array
    kl_teacher_N: Array
    entropy_N: Array
    ess_base_N: Array
    ess_teacher_N: Array


def diagnose(log_q_NV: Array, base_NV: Array, teacher_NV: Array) -> RowDiagnostics:
    """Diagnostics of rows q against base and teacher on the same columns.

    The KLs are summed from their definition, not from F, so |KL_base − KL_teacher| tests the solver.
    """
    xp = array_namespace(log_q_NV)
    q_NV = xp.exp(log_q_NV)
    drawn_NV = q_NV > 0
    zeros_NV = xp.zeros_like(log_q_NV)
    log_q_NV, base_NV, teacher_NV = (
        xp.where(drawn_NV, x, zeros_NV) for x in (log_q_NV, base_NV, teacher_NV)
    )

    def expected(values_NV: Array) -> Array:
        return row_sum(xp, xp.where(drawn_NV, q_NV * values_NV, zeros_NV))

    def ess(model_NV: Array) -> Array:
        return xp.exp(-log_sum_exp(xp.where(drawn_NV, 2 * model_NV - log_q_NV, -xp.inf)))

    return RowDiagnostics(
        kl_base_N=expected(log_q_NV - base_NV),
        kl_teacher_N=expected(log_q_NV - teacher_NV),
        entropy_N=-expected(log_q_NV),
        ess_base_N=ess(base_NV),
        ess_teacher_N=ess(teacher_NV),
    )
