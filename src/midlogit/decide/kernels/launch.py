"""Settings in, kernel launches, Decisions out; knows tables and kernels, not where logits come from.

`prepare` does the CPU's work and may run while the device is busy. `draft` and `launch` only enqueue. The results come
back in one transfer that `KernelDecided` waits for. See docs/kernel.md for how the kernels work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from midlogit.core.rules import EqualKL, FixedAlpha, KLBudget
from midlogit.decide.base import BROKEN, EMPTY, Decided, RowSettings
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


def handles(settings: RowSettings) -> bool:
    """Whether the kernels can decide a row with these settings."""
    return (
        settings.top_logprobs == 0
        and settings.given is None
        and (not settings.outcomes.merged or len(settings.outcomes.stop_ids) <= STOPS)
        and isinstance(settings.rule, EqualKL | FixedAlpha | KLBudget)
    )


@dataclass(frozen=True, slots=True)
class PreparedSettings:
    """The settings of some decisions on the device.

    Attributes:
        settings: one per decision. table_NC: the same as numbers. tables: the alphabets they refer to.
        constrained: whether a decision has a support constraint.
    """

    settings: Sequence[RowSettings]
    table_NC: torch.Tensor
    tables: Tables
    constrained: bool

    def set_teacher_rows(self, rows_N: torch.Tensor) -> None:
        """Sets the rows of the teacher's buffer that hold the logits, where `prepare` did not know them."""
        self.table_NC[:, TEACHER_ROW] = rows_N

    def some(self, numbers: Sequence[int], numbers_M: torch.Tensor) -> PreparedSettings:
        """A subset of the decisions; decision i reads row i of the teacher's buffer.

        Args:
            numbers, numbers_M: which decisions, on the host and on the device.
        """
        settings = [self.settings[n] for n in numbers]
        some = PreparedSettings(settings, self.table_NC[numbers_M], self.tables, self.constrained)
        some.set_teacher_rows(torch.arange(len(numbers), device=numbers_M.device))
        return some


class KernelDecided(Decided):
    """Results of a launch, which are being copied to the host.

    In a row with an error the token is 0.
    """

    def __init__(self, settings: Sequence[RowSettings], tokens_N: torch.Tensor, results_NC: torch.Tensor) -> None:
        self._settings = settings
        self._tokens_N = tokens_N
        self._results = HostCopy(results_NC)

    @property
    def tokens_N(self) -> torch.Tensor:
        return self._tokens_N

    def token_ids(self) -> list[int]:
        return [int(row[0]) for row in self._results.values()]

    def drafted_ids(self) -> list[int]:
        """The base's draft for each decision; it was accepted where it is the decided id. Waits for the device."""
        return [int(row[-1]) for row in self._results.values()]

    def decisions(self) -> list[Decision]:
        return [
            Decision(
                int(token), alpha, kl_base, kl_teacher, entropy, ess_base, ess_teacher, logprob, base, teacher,
                s.forced, fallback > 0, s.top_p is not None, error=ERRORS[int(error)],
            )
            for s, (
                token, alpha, kl_base, kl_teacher, entropy, ess_base, ess_teacher, logprob, base, teacher, fallback,
                error, _,
            ) in zip(self._settings, self._results.values(), strict=True)
        ]  # fmt: skip


class KernelLauncher:
    """Decides CUDA rows in three or four kernel launches per batch, and drafts in one of them.

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
        return PreparedSettings(settings, table_NC, self._alphabets.tables, constrained)

    def allocate_drafts(self, rows: int) -> torch.Tensor:
        """A table for the results of `draft` that `launch` reads, for a base buffer of `rows` rows."""
        return torch.empty((rows, DRAFTS.value), dtype=torch.float64, device=self._device)

    def draft(
        self, base_NV: torch.Tensor, prepared: PreparedSettings, drafts_RC: torch.Tensor, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Enqueues what the base drafts for some decisions on the current stream.

        Args:
            base_NV: as for `launch`; rows of other decisions may still be unwritten.
            drafts_RC: a table of `allocate_drafts`, whose rows are those of base_NV.
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
        return KernelDecided(prepared.settings, tokens_N, results_NC)


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
