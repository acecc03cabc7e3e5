"""Array operations that the array API standard lacks, for NumPy and torch; knows nothing of the mixture.

Names of arrays end in their shape: N rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

Array = Any  # a numpy.ndarray or torch.Tensor; the standard has no static type
Namespace = Any

__all__ = [
    "Array",
    "Namespace",
    "array_namespace",
    "descending_order",
    "device",
    "float64",
    "last_index",
    "log_sum_exp",
    "resolution",
    "row_max",
    "row_sum",
    "running_sum",
    "take_columns",
    "to_column",
    "top_k_unordered",
]


def array_namespace(*arrays: Array) -> Namespace:
    """The array API of the arrays; NumPy itself where it complies, whose own calls cost half as much."""
    return np if isinstance(arrays[0], np.ndarray) else array_api_compat.array_namespace(*arrays)


def device(x: Array) -> Any:
    """The device of an array."""
    return "cpu" if isinstance(x, np.ndarray) else array_api_compat.device(x)


def to_column(values: Sequence[float] | Sequence[int] | Sequence[bool], like: Array) -> Array:
    """One number per row as an array of the library and on the device of `like`."""
    return array_namespace(like).asarray(np.asarray(values), device=device(like))


def row_sum(xp: Namespace, x_NV: Array) -> Array:
    """Row sums in float64, whatever the dtype of the rows (docs/theory.md section 4)."""
    if xp is np:  # without NumPy's wrapper, which costs as much as summing a short row
        return np.add.reduce(x_NV, axis=-1, dtype=np.float64)
    return xp.sum(x_NV, axis=-1, dtype=xp.float64)


def row_max(xp: Namespace, x_NV: Array) -> Array:
    """The largest entry of each row."""
    return np.maximum.reduce(x_NV, axis=-1) if xp is np else xp.max(x_NV, axis=-1)


def running_sum(xp: Namespace, x_NV: Array) -> Array:
    """Cumulative sums of each row in float64."""
    if xp is np:
        return np.add.accumulate(x_NV, axis=-1, dtype=np.float64)
    return xp.cumulative_sum(x_NV, axis=-1, dtype=xp.float64)


def float64(xp: Namespace, x: Array) -> Array:
    """The array in float64; the same array if it is float64 already."""
    return x if x.dtype == xp.float64 else xp.astype(x, xp.float64)


def log_sum_exp(x_NV: Array) -> Array:
    """log Σ exp over the last axis, in float64; −inf for a row that is −inf everywhere.

    NaN or +inf in a row makes its result NaN or +inf, so a finite result means that the row has neither.
    """
    xp = array_namespace(x_NV)
    peak_N = row_max(xp, x_NV)
    shift_N = xp.where(xp.isfinite(peak_N), peak_N, xp.zeros_like(peak_N))
    total_N = row_sum(xp, xp.exp(x_NV - shift_N[:, None]))
    total_N = xp.where(xp.isnan(peak_N), xp.full_like(total_N, xp.nan), total_N)
    tiny = xp.asarray(5e-324, dtype=xp.float64, device=device(x_NV))
    log_N = xp.log(xp.maximum(total_N, tiny)) + xp.astype(shift_N, xp.float64)
    return xp.where(total_N == 0, xp.full_like(log_N, -xp.inf), log_N)


def take_columns(x_NV: Array, columns_NK: Array) -> Array:
    """x[n, columns[n, k]]."""
    if isinstance(x_NV, np.ndarray):  # take_along_axis costs twice as much, for one row four times
        if len(x_NV) == 1:
            return x_NV.take(columns_NK[0], axis=1)
        return x_NV[np.arange(len(x_NV))[:, None], columns_NK]
    return array_namespace(x_NV).take_along_axis(x_NV, columns_NK, axis=-1)


def top_k_unordered(x_NV: Array, k: int) -> Array:
    """Column indices of the `k` largest entries of each row, in no particular order."""
    if array_api_compat.is_torch_array(x_NV):
        return x_NV.topk(k, dim=-1, sorted=False).indices
    xp = array_namespace(x_NV)
    return xp.argpartition(x_NV, x_NV.shape[-1] - k, axis=-1)[:, x_NV.shape[-1] - k :]


def descending_order(x_NV: Array) -> Array:
    """Column indices of each row from the largest entry to the smallest, equal ones in column order."""
    if array_api_compat.is_torch_array(x_NV):
        return x_NV.argsort(dim=-1, descending=True, stable=True)
    return np.argsort(-x_NV, axis=-1, stable=True)


def last_index(xp: Namespace, mask_NV: Array) -> Array:
    """The largest column of each row where the mask is true."""
    columns_V = xp.arange(mask_NV.shape[-1], device=device(mask_NV))
    return row_max(xp, xp.where(mask_NV, columns_V[None, :], 0))


def resolution(x: Array) -> float:
    """The relative spacing of the dtype of `x`."""
    return float(array_namespace(x).finfo(x.dtype).eps)
