"""The columns of the tables that host and kernels share, by name; knows no values and no kernel.

A table is float64, with one row per decision or per row of a buffer. Its columns are the fields of a NamedTuple.
Kernels read constants of the module only where they are constexpr and named one by one, so each column that they use
has one below its table. A new column is a new field; where a kernel reads or writes it, with its constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import triton.language as tl

from midlogit.core.rules import FixedAlpha, KLBudget
from midlogit.decide.base import BROKEN, EMPTY
from midlogit.outputs import Decision


def _offset(table: Any, column: str) -> tl.constexpr:
    return tl.constexpr(table._fields.index(column))


def _width(table: Any) -> tl.constexpr:
    return tl.constexpr(len(table._fields))


class SettingColumns(NamedTuple):
    """The settings of decisions, from the host: each field is a column."""

    base_row: Sequence[int]  # of the base's buffer
    teacher_row: Sequence[int]
    alphabet: Sequence[int]  # row of the AlphabetTables
    inv_temperature: Sequence[float]
    greedy: Sequence[bool]
    top_p: Sequence[float]  # above 1 without a support constraint
    tolerance: Sequence[float]  # of α
    rule: Sequence[int | None]  # AlphaRule.kernel_code
    rule_parameter: Sequence[float]
    forced: Sequence[bool]
    draft_uniform: Sequence[float]
    accept_uniform: Sequence[float]
    redraw_uniform: Sequence[float]
    ending_uniform: Sequence[float]
    base_stop: Sequence[bool]  # whether a stop id is drawn from the base's own conditional
    given: Sequence[int]  # id that is described in place of a drawn one; −1 to draw
    top_logprobs: Sequence[int]  # ids to list of q, base and teacher


SETTING_BASE_ROW = _offset(SettingColumns, "base_row")
SETTING_TEACHER_ROW = _offset(SettingColumns, "teacher_row")
SETTING_ALPHABET = _offset(SettingColumns, "alphabet")
SETTING_INV_TEMPERATURE = _offset(SettingColumns, "inv_temperature")
SETTING_GREEDY = _offset(SettingColumns, "greedy")
SETTING_TOP_P = _offset(SettingColumns, "top_p")
SETTING_TOLERANCE = _offset(SettingColumns, "tolerance")
SETTING_RULE = _offset(SettingColumns, "rule")
SETTING_RULE_PARAMETER = _offset(SettingColumns, "rule_parameter")
SETTING_FORCED = _offset(SettingColumns, "forced")
SETTING_DRAFT_UNIFORM = _offset(SettingColumns, "draft_uniform")
SETTING_ACCEPT_UNIFORM = _offset(SettingColumns, "accept_uniform")
SETTING_REDRAW_UNIFORM = _offset(SettingColumns, "redraw_uniform")
SETTING_ENDING_UNIFORM = _offset(SettingColumns, "ending_uniform")
SETTING_BASE_STOP = _offset(SettingColumns, "base_stop")
SETTING_GIVEN = _offset(SettingColumns, "given")
SETTING_TOP_LOGPROBS = _offset(SettingColumns, "top_logprobs")
SETTING_COLUMNS = _width(SettingColumns)


class DraftRow(NamedTuple):
    """Results of the draft kernel for one row of the base's buffer."""

    outcome: float  # the draft; a merged stop class as its first id
    peak: float  # largest effective logit, −inf where nothing can be drawn
    log2_mass: float  # of what can be drawn, relative to the peak
    lse: float  # raw log-sum-exp of all ids
    tempered_lse: float  # the same of the tempered logits
    lowest: float  # smallest logit of the ids that are not hidden, or 0
    stop: float  # the stop class as an effective logit
    stop_raw: float  # its raw log-sum-exp
    stop_id: float  # the member that the base's own conditional draws


DRAFT_OUTCOME = _offset(DraftRow, "outcome")
DRAFT_PEAK = _offset(DraftRow, "peak")
DRAFT_LOG2_MASS = _offset(DraftRow, "log2_mass")
DRAFT_LSE = _offset(DraftRow, "lse")
DRAFT_TEMPERED_LSE = _offset(DraftRow, "tempered_lse")
DRAFT_LOWEST = _offset(DraftRow, "lowest")
DRAFT_STOP = _offset(DraftRow, "stop")
DRAFT_STOP_RAW = _offset(DraftRow, "stop_raw")
DRAFT_STOP_ID = _offset(DraftRow, "stop_id")
DRAFT_COLUMNS = _width(DraftRow)


class ScanRow(NamedTuple):
    """Results of the teacher scan for one decision."""

    lse: float  # raw log-sum-exp of all ids
    tempered_lse: float  # the same of the tempered logits
    peak: float  # largest effective logit
    stop: float  # the stop class as an effective logit
    stop_raw: float  # its raw log-sum-exp
    stop_id: float  # the member of the stop class to emit
    stop_base: float  # its tempered logit of the base
    stop_teacher: float  # and of the teacher
    candidates: float  # of the nucleus, copied out; −1 where they are not copied
    low: float  # bracket of the threshold of the nucleus, as ordered bits
    high: float
    low_mass: float  # mass at or above either end
    high_mass: float
    target_mass: float  # to be reached by the nucleus
    lowest: float  # smallest logit of the ids that are not hidden, or 0


SCAN_LSE = _offset(ScanRow, "lse")
SCAN_TEMPERED_LSE = _offset(ScanRow, "tempered_lse")
SCAN_PEAK = _offset(ScanRow, "peak")
SCAN_STOP = _offset(ScanRow, "stop")
SCAN_STOP_RAW = _offset(ScanRow, "stop_raw")
SCAN_STOP_ID = _offset(ScanRow, "stop_id")
SCAN_STOP_BASE = _offset(ScanRow, "stop_base")
SCAN_STOP_TEACHER = _offset(ScanRow, "stop_teacher")
SCAN_CANDIDATES = _offset(ScanRow, "candidates")
SCAN_LOW = _offset(ScanRow, "low")
SCAN_HIGH = _offset(ScanRow, "high")
SCAN_LOW_MASS = _offset(ScanRow, "low_mass")
SCAN_HIGH_MASS = _offset(ScanRow, "high_mass")
SCAN_TARGET_MASS = _offset(ScanRow, "target_mass")
SCAN_LOWEST = _offset(ScanRow, "lowest")
SCAN_COLUMNS = _width(ScanRow)


class MixtureRow(NamedTuple):
    """What the solve kernel leaves of one decision's q, for its list; undefined in a row with an error."""

    b_peak: float  # down to `q_size` as in report.Mixture
    t_peak: float
    c: float
    alpha: float
    to_teacher: float
    t_size: float
    q_size: float
    log_z: float  # log Σ q
    tau: float  # as in tiles.RowPair
    tie: float  # an id


MIXTURE_B_PEAK = _offset(MixtureRow, "b_peak")
MIXTURE_T_PEAK = _offset(MixtureRow, "t_peak")
MIXTURE_C = _offset(MixtureRow, "c")
MIXTURE_ALPHA = _offset(MixtureRow, "alpha")
MIXTURE_TO_TEACHER = _offset(MixtureRow, "to_teacher")
MIXTURE_T_SIZE = _offset(MixtureRow, "t_size")
MIXTURE_Q_SIZE = _offset(MixtureRow, "q_size")
MIXTURE_LOG_Z = _offset(MixtureRow, "log_z")
MIXTURE_TAU = _offset(MixtureRow, "tau")
MIXTURE_TIE = _offset(MixtureRow, "tie")
MIXTURE_COLUMNS = _width(MixtureRow)


class ResultRow(NamedTuple):
    """The result of one decision, for the host; begins with the fields of `midlogit.outputs.Decision`, in its order."""

    token_id: float
    alpha: float  # weight of the teacher
    kl_base: float  # nats
    kl_teacher: float
    entropy: float
    ess_base: float  # in [0, 1]
    ess_teacher: float
    logprob: float  # log q
    base_logprob: float  # raw
    teacher_logprob: float
    base_tempered_logprob: float
    teacher_tempered_logprob: float
    base_support_logprob: float
    teacher_support_logprob: float
    base_support_logmass: float
    teacher_support_logmass: float
    fallback: float
    error: float  # index into ERRORS
    draft: float  # the drafted outcome


RESULT_TOKEN_ID = _offset(ResultRow, "token_id")
RESULT_ALPHA = _offset(ResultRow, "alpha")
RESULT_KL_BASE = _offset(ResultRow, "kl_base")
RESULT_KL_TEACHER = _offset(ResultRow, "kl_teacher")
RESULT_ENTROPY = _offset(ResultRow, "entropy")
RESULT_ESS_BASE = _offset(ResultRow, "ess_base")
RESULT_ESS_TEACHER = _offset(ResultRow, "ess_teacher")
RESULT_LOGPROB = _offset(ResultRow, "logprob")
RESULT_BASE_LOGPROB = _offset(ResultRow, "base_logprob")
RESULT_TEACHER_LOGPROB = _offset(ResultRow, "teacher_logprob")
RESULT_BASE_TEMPERED_LOGPROB = _offset(ResultRow, "base_tempered_logprob")
RESULT_TEACHER_TEMPERED_LOGPROB = _offset(ResultRow, "teacher_tempered_logprob")
RESULT_BASE_SUPPORT_LOGPROB = _offset(ResultRow, "base_support_logprob")
RESULT_TEACHER_SUPPORT_LOGPROB = _offset(ResultRow, "teacher_support_logprob")
RESULT_BASE_SUPPORT_LOGMASS = _offset(ResultRow, "base_support_logmass")
RESULT_TEACHER_SUPPORT_LOGMASS = _offset(ResultRow, "teacher_support_logmass")
RESULT_FALLBACK = _offset(ResultRow, "fallback")
RESULT_ERROR = _offset(ResultRow, "error")
RESULT_DRAFT = _offset(ResultRow, "draft")
RESULT_COLUMNS = _width(ResultRow)
_SHARED = ResultRow._fields[: ResultRow._fields.index("fallback")]
assert tuple(field.name for field in fields(Decision))[: len(_SHARED)] == _SHARED

ERRORS = (None, BROKEN, EMPTY)
ERROR_BROKEN = tl.constexpr(ERRORS.index(BROKEN))
ERROR_EMPTY = tl.constexpr(ERRORS.index(EMPTY))

FIXED_ALPHA = tl.constexpr(FixedAlpha.kernel_code)
KL_BUDGET = tl.constexpr(KLBudget.kernel_code)
