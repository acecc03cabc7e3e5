"""Settings in, kernel launches, Decisions out; knows sampling/policy.py's types, not where logits come from.

`prepare` does the CPU's work and may run while the device is busy, `draft` and `launch` only enqueue, and the results
come back in one transfer that `Pending` waits for. See docs/kernel.md for how the kernels work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from midlogit.core.rules import EqualKL, FixedAlpha, KLBudget
from midlogit.decide.base import BROKEN, EMPTY, RowSettings
from midlogit.decide.kernels.draft import DRAFTS, draft_kernel
from midlogit.decide.kernels.masks import STOPS, Alphabets, Tables
from midlogit.decide.kernels.solve import RESULTS, solve_kernel
from midlogit.decide.kernels.teacher_scan import STATE, survey_kernel
from midlogit.decide.transfer import HostCopy
from midlogit.outputs import Decision

LANES = 512  # lanes of a tile, eight ids each
CAPACITY = 4096  # candidates of a nucleus that are copied out
WARPS, REGISTERS = 16, 64  # of a program: two of them share a multiprocessor
FEW_LANES, FEW_WARPS = 128, 4  # the same for those copies
GROUP = 4  # tiles whose mass is kept for a draw
COARSE = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # low bits of a float32 that a row's type lacks
UNCONSTRAINED = 2.0
TEACHER_ROW = 1  # column of a prepared table
ERRORS = (None, BROKEN, EMPTY)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a launch needs besides logits.

    Attributes:
        settings: one a decision. table_NC: the same as numbers on the device. tables: the alphabets they refer to.
    """

    settings: Sequence[RowSettings]
    table_NC: torch.Tensor
    tables: Tables
    constrained: bool

    def teacher_at(self, rows_N: torch.Tensor) -> None:
        """Says which rows of the teacher's buffer hold the logits, where that was not known to `prepare`."""
        self.table_NC[:, TEACHER_ROW] = rows_N

    def some(self, numbers: Sequence[int], numbers_M: torch.Tensor) -> Prepared:
        """A few of the decisions, whose rows of the teacher are the first of a buffer, in this order.

        Args:
            numbers, numbers_M: which, here and on the device.
        """
        few = Prepared([self.settings[n] for n in numbers], self.table_NC[numbers_M], self.tables, self.constrained)
        few.teacher_at(torch.arange(len(numbers), device=numbers_M.device))
        return few


class Pending:
    """Tokens that are being drawn.

    Attributes:
        tokens_N: their ids on the device, int64, for work enqueued later on the same stream; 0 in a row with an
            error, and another member of the stop class in place of one that only one model has.
    """

    def __init__(self, settings: Sequence[RowSettings], tokens_N: torch.Tensor, results_NC: torch.Tensor) -> None:
        self.tokens_N = tokens_N
        self._settings = settings
        self._results = HostCopy(results_NC)

    def _rows(self) -> list[list[float]]:
        return self._results.values()

    def token_ids(self) -> list[int]:
        """The drawn ids; waits for the device."""
        return [int(row[0]) for row in self._rows()]

    def drafted_ids(self) -> list[int]:
        """What the base drafted for each decision; waits for the device. It stands where it is the drawn id."""
        return [int(row[-1]) for row in self._rows()]

    def decisions(self) -> list[Decision]:
        """What `decide` gives for the same rows and settings; waits for the device."""
        return [
            Decision(
                int(token), alpha, kl_base, kl_teacher, entropy, ess_base, ess_teacher, logprob, base, teacher,
                s.forced, fallback > 0, s.top_p is not None, error=ERRORS[int(error)],
            )
            for s, (
                token, alpha, kl_base, kl_teacher, entropy, ess_base, ess_teacher, logprob, base, teacher, fallback,
                error, _,
            ) in zip(self._settings, self._rows(), strict=True)
        ]  # fmt: skip


class FusedPolicy:
    """`sampling.policy.decide` for CUDA rows in three or four kernel launches a batch, `draft` in one of them.

    Args:
        vocabulary: ids drawn from are below it; columns beyond count as mass of their model.
        device: where the logits are.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._tile = 8 * LANES
        self._alphabets = Alphabets(vocabulary, self._tile, device)

    @staticmethod
    def handles(settings: RowSettings) -> bool:
        """Whether a row with these settings can be prepared; the others are for `decide`."""
        return (
            settings.top_logprobs == 0
            and settings.given is None
            and (not settings.outcomes.merged or len(settings.outcomes.stop_ids) <= STOPS)
            and isinstance(settings.rule, EqualKL | FixedAlpha | KLBudget)
        )

    def prepare(
        self,
        settings: Sequence[RowSettings],
        base_rows: Sequence[int] | None = None,
        teacher_rows: Sequence[int] | None = None,
    ) -> Prepared:
        """Uploads what the rows ask for, without waiting for the device.

        Args:
            settings: one a decision, each with `handles(settings)`.
            base_rows, teacher_rows: the row of each model's buffer that holds the decision's logits; by default
                the decision's own number. No two decisions share a row of the base.
        """
        assert base_rows is None or len(set(base_rows)) == len(base_rows)
        self._alphabets.make_room()
        rows = range(len(settings))
        table = [
            (
                base_row,
                teacher_row,
                self._alphabets.number(s.outcomes, s.may_end),
                1 / (s.temperature or 1.0),
                s.temperature == 0,
                UNCONSTRAINED if s.top_p is None else s.top_p,
                s.alpha_tol,
                *_rule(s.rule),
                s.forced,
                *s.uniforms,
            )
            for s, base_row, teacher_row in zip(settings, base_rows or rows, teacher_rows or rows, strict=True)
        ]
        cuda = self._device.type == "cuda"
        table_NC = torch.tensor(table, dtype=torch.float64, pin_memory=cuda).to(self._device, non_blocking=True)
        constrained = any(s.top_p is not None for s in settings)
        return Prepared(settings, table_NC, self._alphabets.tables, constrained)

    def drafts(self, rows: int) -> torch.Tensor:
        """A table for the drafts of a base buffer of so many rows: what `draft` leaves there for `launch`."""
        return torch.empty((rows, DRAFTS.value), dtype=torch.float64, device=self._device)

    def draft(
        self, base_NV: torch.Tensor, prepared: Prepared, drafts_RC: torch.Tensor, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Enqueues what the base drafts for some decisions on the current stream.

        Args:
            base_NV: as for `launch`; rows of other decisions may still be unwritten.
            drafts_RC: a table of `drafts`, whose rows are those of base_NV.
            rows: which of the prepared decisions, one after the other.

        Returns:
            Their drafted ids on the device, int64, for work enqueued later on the same stream: the merged stop class as
            its first id, and 0 in a row from which nothing can be drawn.
        """
        first, last, _ = rows.indices(len(prepared.settings))
        tokens_N = torch.empty(last - first, dtype=torch.int64, device=self._device)
        if last > first:
            draft_kernel[(last - first,)](
                base_NV, base_NV.stride(0), base_NV.shape[1], self._vocabulary, prepared.table_NC, first,
                *_alphabets(prepared.tables), drafts_RC, tokens_N,
                R=LANES, STOPS=STOPS, GROUP=GROUP, GROUPS=_groups(self._vocabulary, LANES),
                num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
        return tokens_N

    def launch(
        self,
        base_NV: torch.Tensor,
        teacher_NV: torch.Tensor,
        prepared: Prepared,
        drafts_RC: torch.Tensor | None = None,
    ) -> Pending:
        """Enqueues the decisions of a batch on the current stream.

        Args:
            base_NV, teacher_NV: raw logits of all ids of each model, float32, float16 or bfloat16, contiguous along
                V; they may have more rows than are used, and must not change before the kernels have run.
            drafts_RC: the table that holds a draft for every decision, made with the same settings; without it the
                drafts are made here.
        """
        if drafts_RC is None:
            drafts_RC = self.drafts(len(base_NV))
            self.draft(base_NV, prepared, drafts_RC)
        rows, device = len(prepared.settings), self._device
        settings_NC, alphabets = prepared.table_NC, _alphabets(prepared.tables)
        state_NC = torch.empty((rows, STATE.value), dtype=torch.float64, device=device)
        results_NC = torch.empty((rows, RESULTS.value), dtype=torch.float64, device=device)
        tokens_N = torch.empty(rows, dtype=torch.int64, device=device)
        few = (rows, CAPACITY) if prepared.constrained else (0, CAPACITY)
        few_base_NK = torch.empty(few, dtype=torch.float32, device=device)
        few_teacher_NK = torch.empty(few, dtype=torch.float32, device=device)
        few_ids_NK = torch.empty(few, dtype=torch.int32, device=device)
        coarse = COARSE[teacher_NV.dtype]
        if rows:
            survey_kernel[(rows,)](
                base_NV, base_NV.stride(0), teacher_NV, teacher_NV.stride(0), teacher_NV.shape[1], self._vocabulary,
                settings_NC,
                *alphabets, drafts_RC, state_NC, few_base_NK, few_teacher_NK, few_ids_NK,
                R=LANES, STOPS=STOPS, SHIFT=coarse, NUCLEUS=prepared.constrained, CAPACITY=CAPACITY,
                num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
            solve_kernel[(rows,)](
                base_NV, base_NV.stride(0), teacher_NV, teacher_NV.stride(0), self._vocabulary, self._vocabulary,
                few_ids_NK,
                settings_NC, *alphabets, drafts_RC, state_NC, results_NC, tokens_N,
                R=LANES, STOPS=STOPS, SHIFT=coarse, NUCLEUS=prepared.constrained, FULL=True,
                GROUP=GROUP, GROUPS=_groups(self._vocabulary, LANES),
                num_warps=WARPS, maxnreg=REGISTERS, enable_fp_fusion=_aligned(base_NV, teacher_NV),
            )  # fmt: skip
        if rows and prepared.constrained:
            solve_kernel[(rows,)](
                few_base_NK, CAPACITY, few_teacher_NK, CAPACITY, CAPACITY, self._vocabulary, few_ids_NK,
                settings_NC, *alphabets, drafts_RC, state_NC, results_NC, tokens_N,
                R=FEW_LANES, STOPS=STOPS, SHIFT=coarse, NUCLEUS=True, FULL=False,
                GROUP=GROUP, GROUPS=_groups(CAPACITY, FEW_LANES), num_warps=FEW_WARPS,
            )  # fmt: skip
        return Pending(prepared.settings, tokens_N, results_NC)


def _aligned(*rows: torch.Tensor) -> bool:
    """Whether each thread reads several ids of a lane at once, as it does where rows begin at multiples of 16.

    With one id a thread, eight threads sum a lane, and a product may be fused into each thread's own sum: they would
    hold sums that differ in the last digit, and which of them is used would be chance.
    """
    return all(rows_NV.stride(0) % 16 == 0 and rows_NV.data_ptr() % 16 == 0 for rows_NV in rows)


def _alphabets(tables: Tables) -> tuple[torch.Tensor | int, ...]:
    """Tables as the kernels take them."""
    hidden_AB, dirty_AT = tables.hidden_AB, tables.dirty_AT
    return hidden_AB, hidden_AB.stride(0), dirty_AT, dirty_AT.stride(0), tables.stops_AS


def _rule(rule: object) -> tuple[int, float]:
    """A rule as the kernel reads it (solve.py: EQUAL_KL, FIXED_ALPHA, KL_BUDGET)."""
    if isinstance(rule, FixedAlpha):
        return 1, rule.value
    if isinstance(rule, KLBudget):
        return 2, rule.epsilon
    return 0, 0.0


def _groups(columns: int, lanes: int) -> int:
    """How many groups of tiles hold so many columns, as a power of two."""
    return 1 << (-(-columns // (8 * lanes * GROUP)) - 1).bit_length()
