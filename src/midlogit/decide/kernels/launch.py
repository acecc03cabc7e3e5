"""Settings in, kernel launches, results out; knows tables and kernels, not where logits come from.

`prepare` does the CPU's work and may run while the device is busy. `draft` and `launch` only enqueue. The results come
back in one transfer that `KernelDecided` waits for. See docs/kernel.md for how the kernels work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from midlogit.core.noise import IDS_PER_BLOCK
from midlogit.decide.base import RowSettings
from midlogit.decide.kernels.decided import KernelDecided, TopTables
from midlogit.decide.kernels.draft import draft_kernel
from midlogit.decide.kernels.layout import (
    DRAFT_COLUMNS,
    MIXTURE_COLUMNS,
    RESULT_COLUMNS,
    SCAN_COLUMNS,
    SETTING_TEACHER_ROW,
    SettingColumns,
)
from midlogit.decide.kernels.masks import STOPS, Alphabets, AlphabetTables
from midlogit.decide.kernels.solve import solve_kernel
from midlogit.decide.kernels.teacher_scan import teacher_scan_kernel
from midlogit.decide.kernels.top import LISTS, top_kernel
from midlogit.decide.transfer import to_device
from midlogit.params import MOST_LOGPROBS

LANES = 512  # lanes of a tile, eight ids each
CAPACITY = 4096  # candidates of a nucleus that are copied out
WARPS, REGISTERS = 16, 64  # of a program: two of them share a multiprocessor
FEW_LANES, FEW_WARPS = 128, 4  # the same for those copies
LONGEST = (32, MOST_LOGPROBS)  # lists of top_logprobs that the kernel is compiled for
COARSE = {
    torch.float32: 0,
    torch.float16: 13,
    torch.bfloat16: 16,
}  # low bits of a float32 that a row's type lacks
UNCONSTRAINED = 2.0  # top_p of a row without a support constraint
NOT_GIVEN = -1  # for a row whose token is drawn


def handles(settings: RowSettings) -> bool:
    """Whether the kernels can decide a row with these settings."""
    return (
        not settings.return_support
        and (not settings.outcomes.merged or len(settings.outcomes.stop_ids) <= STOPS)
        and settings.rule.kernel_code is not None
    )


@dataclass(frozen=True, slots=True)
class PreparedSettings:
    """The settings of some decisions on the device.

    Attributes:
        settings: one per decision. table_NC: the same as numbers. tables: the alphabets they refer to.
        constrained: whether a decision has a support constraint.
        top_logprobs: the most that a decision asks for.
    """

    settings: Sequence[RowSettings]
    table_NC: torch.Tensor
    tables: AlphabetTables
    constrained: bool
    top_logprobs: int

    def set_teacher_rows(self, rows_N: torch.Tensor) -> None:
        """Sets the rows of the teacher's buffer that hold the logits, where `prepare` did not know them."""
        self.table_NC[:, SETTING_TEACHER_ROW.value] = rows_N

    def some(self, numbers: Sequence[int], numbers_M: torch.Tensor) -> PreparedSettings:
        """A subset of the decisions, without their lists; decision i reads row i of the teacher's buffer.

        Args:
            numbers, numbers_M: which decisions, on the host and on the device.
        """
        settings = [self.settings[n] for n in numbers]
        some = PreparedSettings(
            settings, self.table_NC[numbers_M], self.tables, self.constrained, 0
        )
        some.set_teacher_rows(torch.arange(len(numbers), device=numbers_M.device))
        return some


class KernelLauncher:
    """Decides CUDA rows in three to five kernel launches per batch, and drafts in one of them.

    Args:
        vocabulary: ids below it are drawn; columns beyond count as mass of their model.
        device: of the logits.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._tile = 8 * LANES
        self._alphabets = Alphabets(vocabulary, self._tile, device)

    def prepare(
        self,
        settings: Sequence[RowSettings],
        base_rows: Sequence[int] | None = None,
        teacher_rows: Sequence[int] | None = None,
    ) -> PreparedSettings:
        """Uploads settings without waiting for the device.

        Args:
            settings: one per decision, each with `handles(settings)`.
            base_rows, teacher_rows: the row of each model's buffer that holds the decision's logits; by default
                the decision's own number. No two decisions share a row of the base.
        """
        assert base_rows is None or len(set(base_rows)) == len(base_rows)
        self._alphabets.make_room()
        own_rows = range(len(settings))
        columns = SettingColumns(
            base_row=base_rows or own_rows,
            teacher_row=teacher_rows or own_rows,
            alphabet=[self._alphabets.number(s.outcomes, s.may_end) for s in settings],
            inv_temperature=[1 / (s.temperature or 1.0) for s in settings],
            greedy=[s.temperature == 0 for s in settings],
            top_p=[UNCONSTRAINED if s.top_p is None else s.top_p for s in settings],
            tolerance=[s.alpha_tol for s in settings],
            rule=[s.rule.kernel_code for s in settings],
            rule_parameter=[s.rule.kernel_parameter for s in settings],
            forced=[s.forced for s in settings],
            draft_uniform=[s.uniforms.draft for s in settings],
            accept_uniform=[s.uniforms.accept for s in settings],
            redraw_uniform=[s.uniforms.redraw for s in settings],
            ending_uniform=[s.uniforms.ending for s in settings],
            base_stop=[s.outcomes.draws_stop_id for s in settings],
            given=[NOT_GIVEN if s.given is None else s.given for s in settings],
            top_logprobs=[s.top_logprobs for s in settings],
        )
        table_NC = torch.from_numpy(np.array(columns, dtype=np.float64).T.copy())
        constrained = any(s.top_p is not None for s in settings)
        return PreparedSettings(
            settings,
            to_device(table_NC, self._device),
            self._alphabets.tables,
            constrained,
            max((s.top_logprobs for s in settings), default=0),
        )

    def allocate_drafts(self, rows: int) -> torch.Tensor:
        """A table for the results of `draft` that `launch` reads, for a base buffer of `rows` rows."""
        return self._empty(rows, DRAFT_COLUMNS.value)

    def draft(
        self,
        base_NV: torch.Tensor,
        prepared: PreparedSettings,
        drafts_RC: torch.Tensor,
        rows: slice = slice(None),
    ) -> torch.Tensor:
        """Enqueues the base's drafts for some decisions on the current stream.

        Args:
            base_NV: as for `launch`; rows of other decisions may still be unwritten.
            drafts_RC: a table of `allocate_drafts`, whose rows are those of base_NV.
            rows: which of the prepared decisions, one after the other.

        Returns:
            Their drafted ids on the device, int64, for work enqueued later on the same stream: the merged stop class as
            its first id, and 0 in a row from which nothing can be drawn.
        """
        first, last, _ = rows.indices(len(prepared.settings))
        tokens_N = self._empty(last - first, dtype=torch.int64)
        self._run(
            draft_kernel,
            last - first,
            base=base_NV,
            base_stride=base_NV.stride(0),
            width=base_NV.shape[1],
            length=self._vocabulary,
            settings=prepared.table_NC,
            first=first,
            **_alphabets(prepared.tables),
            drafts=drafts_RC,
            tokens=tokens_N,
            R=LANES,
            STOPS=STOPS,
            **self._blocks,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
        return tokens_N

    def launch(
        self,
        base_NV: torch.Tensor,
        teacher_NV: torch.Tensor,
        prepared: PreparedSettings,
        drafts_RC: torch.Tensor | None = None,
    ) -> KernelDecided:
        """Enqueues the decisions of a batch on the current stream.

        Args:
            base_NV, teacher_NV: raw logits of all ids of each model, float32, float16 or bfloat16, contiguous along
                V; they may have more rows than are used, and must not change before the kernels have run.
            drafts_RC: the table that holds a draft for every decision, made with the same settings; without it the
                drafts are made here.
        """
        if drafts_RC is None:
            drafts_RC = self.allocate_drafts(len(base_NV))
            self.draft(base_NV, prepared, drafts_RC)
        rows = len(prepared.settings)
        results_NC = self._empty(rows, RESULT_COLUMNS.value)
        tokens_N = self._empty(rows, dtype=torch.int64)
        few_rows = rows if prepared.constrained else 0
        few = self._few(few_rows)

        tables = {
            "settings": prepared.table_NC,
            **_alphabets(prepared.tables),
            "drafts": drafts_RC,
            "scans": self._empty(rows, SCAN_COLUMNS.value),
            "STOPS": STOPS,
        }
        sizes = {"SHIFT": COARSE[teacher_NV.dtype], "NUCLEUS": prepared.constrained}
        pair = {**_pair(base_NV, teacher_NV, self._vocabulary), **tables, "R": LANES}
        whole = {**pair, **sizes, "num_warps": WARPS, "maxnreg": REGISTERS}
        copies = {**_pair(few["few_base"], few["few_teacher"], CAPACITY), **tables, **sizes}
        copies |= {"R": FEW_LANES, "num_warps": FEW_WARPS}
        found = {"results": results_NC, "mixtures": self._empty(rows, MIXTURE_COLUMNS.value)}
        outputs = {**found, "ids": few["few_ids"], "vocabulary": self._vocabulary}
        outputs |= {"tokens": tokens_N}

        widths = {"base_width": base_NV.shape[1], "width": teacher_NV.shape[1]}
        self._run(teacher_scan_kernel, rows, **whole, **few, **widths, CAPACITY=CAPACITY)
        fusion = _aligned(base_NV, teacher_NV)
        self._run(
            solve_kernel,
            rows,
            **whole,
            **outputs,
            **self._blocks,
            FULL=True,
            enable_fp_fusion=fusion,
        )
        self._run(solve_kernel, few_rows, **copies, **outputs, **self._blocks, FULL=False)
        top = self._list_top(rows, prepared.top_logprobs, **pair, **widths, **found)
        return KernelDecided(prepared.settings, tokens_N, results_NC, top)

    def _list_top(self, rows: int, most: int, **arguments: Any) -> TopTables | None:
        """Enqueues the lists of `top_logprobs`, after the decisions."""
        if not most:
            return None
        tables = TopTables(
            ids_NLK=self._empty(rows, LISTS.value, most, dtype=torch.int32),
            logprobs_NLK=self._empty(rows, LISTS.value, most),
        )
        self._run(
            top_kernel,
            LISTS.value * rows,
            **arguments,
            ids=tables.ids_NLK,
            logprobs=tables.logprobs_NLK,
            most=most,
            K=min(size for size in LONGEST if size >= most),
            num_warps=WARPS,
            maxnreg=REGISTERS,
            enable_fp_fusion=False,  # both sweeps must give an id the same score
        )
        return tables

    @property
    def _blocks(self) -> dict[str, int]:
        """Sizes of the blocks that are drawn from first, as the kernels take them."""
        num_blocks = -(-self._vocabulary // IDS_PER_BLOCK)
        return {"BLOCK": IDS_PER_BLOCK, "BLOCKS": triton.next_power_of_2(num_blocks)}

    def _few(self, rows: int) -> dict[str, torch.Tensor]:
        """Buffers for the candidates of the nucleus, copied out of both rows."""
        return {
            "few_base": self._empty(rows, CAPACITY, dtype=torch.float32),
            "few_teacher": self._empty(rows, CAPACITY, dtype=torch.float32),
            "few_ids": self._empty(rows, CAPACITY, dtype=torch.int32),
        }

    def _run(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Enqueues a kernel on the device of the logits; Triton alone would take the current one."""
        if programs:
            with torch.cuda.device_of(arguments["base"]):  # type: ignore[no-untyped-call]
                kernel[(programs,)](**arguments)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)


def _aligned(*rows: torch.Tensor) -> bool:
    """Whether each thread reads several ids of a lane at once, as it does where rows begin at multiples of 16.

    With one id per thread, eight threads sum a lane, and a product may be fused into each thread's own sum: they would
    hold sums that differ in the last digit, and which of them is used would be chance.
    """
    return all(rows_NV.stride(0) % 16 == 0 and rows_NV.data_ptr() % 16 == 0 for rows_NV in rows)


def _pair(
    base_NV: torch.Tensor, teacher_NV: torch.Tensor, length: int
) -> dict[str, torch.Tensor | int]:
    """Rows of both models as the kernels take them."""
    return {
        "base": base_NV,
        "base_stride": base_NV.stride(0),
        "teacher": teacher_NV,
        "teacher_stride": teacher_NV.stride(0),
        "length": length,
    }


def _alphabets(tables: AlphabetTables) -> dict[str, torch.Tensor | int]:
    """Tables as the kernels take them."""
    return {
        "hidden": tables.hidden_AB,
        "hidden_stride": tables.hidden_AB.stride(0),
        "hidden_tiles": tables.hidden_tiles_AT,
        "hidden_tiles_stride": tables.hidden_tiles_AT.stride(0),
        "stops": tables.stops_AS,
    }
