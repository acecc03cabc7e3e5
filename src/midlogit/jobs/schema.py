"""The columns of a job's results: one row per completion, per-token lists beside scalars; knows no files.

A `Record` holds what a completion adds to its input row, in the types in which it is stored. `results_table` joins
records with their input rows. Floats are float32: half the size of float64, and far more exact than logits are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from midlogit.errors import InvalidRequest
from midlogit.outputs import Candidates, Completion, Diagnostics
from midlogit.requests.prompts import Prompt

if TYPE_CHECKING:
    import pyarrow as pa

DiagnosticsLevel = Literal["full", "compact", "none"]
LEVELS: tuple[DiagnosticsLevel, ...] = ("full", "compact", "none")

LOGPROBS = (
    "logprobs",
    "base_logprobs",
    "teacher_logprobs",
    "base_tempered_logprobs",
    "teacher_tempered_logprobs",
)
FLOAT_LISTS = (
    "alpha",
    "kl_base",
    "kl_teacher",
    "entropy",
    "ess_base",
    "ess_teacher",
    *LOGPROBS,
    "base_support_logmass",
    "teacher_support_logmass",
    "coverage",
    "alpha_bound",
    "tv_bound",
    "base_tempered_bound",
    "teacher_tempered_bound",
)
FLAG_LISTS = ("forced", "base_bounded", "teacher_bounded")
SCALARS = (
    "mean_alpha",
    "mean_kl_base",
    "mean_kl_teacher",
    "max_kl",
    "mean_entropy",
    "sum_logprob",
    "sum_base_logprob",
    "sum_teacher_logprob",
    "sum_base_tempered_logprob",
    "sum_teacher_tempered_logprob",
    "sum_tv_bound",
    "min_coverage",
)
TOP_SIDES = ("q", "base", "teacher")
COMPACT_BITS = 16  # of the mantissa of float32, which has 23

Record = dict[str, Any]  # column name to value; arrays of NumPy for lists


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns the results of a job have.

    Attributes:
        diagnostics: "full" stores per-token lists as float32, "compact" rounds all but the log-probabilities to 16 bits
            of mantissa, "none" stores scalars per completion only.
        top_logprobs: candidates per position that are stored; 0 for none.
        carried: the Arrow schema of the user's other columns.
    """

    diagnostics: DiagnosticsLevel
    top_logprobs: int
    carried: pa.Schema

    @property
    def list_columns(self) -> tuple[str, ...]:
        """The names of the per-token columns of diagnostics."""
        return () if self.diagnostics == "none" else FLOAT_LISTS + FLAG_LISTS

    @property
    def top_columns(self) -> tuple[str, ...]:
        """The names of the columns of candidates: ids and log-probabilities per side."""
        return TOP_COLUMNS if self.top_logprobs else ()

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the results."""
        import pyarrow as pa

        text, count = pa.string(), pa.int32()
        fields = [
            ("row_id", text),
            ("sample", count),
            ("seed", pa.uint64()),
            ("prompt", text),
            ("prompt_form", text),
            ("base_prompt", text),
            ("base_prompt_form", text),
            ("text", text),
            ("token_ids", pa.list_(pa.int32())),
            ("finish_reason", text),
            ("stop_reason", text),
            ("weights_changed", text),
            ("error", text),
            ("prompt_tokens", count),
            ("base_prompt_tokens", count),
            ("completion_tokens", count),
            *((name, pa.float64()) for name in SCALARS),
        ]
        if self.diagnostics != "none":
            fields += [(name, pa.list_(pa.float32())) for name in FLOAT_LISTS]
            fields += [(name, pa.list_(pa.bool_())) for name in FLAG_LISTS]
        for name in self.top_columns:
            value = pa.int32() if name.endswith("_ids") else pa.float32()
            fields.append((name, pa.list_(pa.list_(value))))
        return pa.schema([*map(pa.field, *zip(*fields, strict=True)), *self.carried])


PLANNED_COLUMNS = ("row_id", "prompt", "prompt_form", "base_prompt", "base_prompt_form")
OWN_SCALARS = (
    *PLANNED_COLUMNS,
    "sample",
    "seed",
    "text",
    "finish_reason",
    "stop_reason",
    "weights_changed",
    "error",
    "prompt_tokens",
    "base_prompt_tokens",
    "completion_tokens",
    *SCALARS,
)
TOP_COLUMNS = tuple(f"top_{side}_{part}" for side in TOP_SIDES for part in ("ids", "logprobs"))
OWN_COLUMNS = frozenset((*OWN_SCALARS, "token_ids", *FLOAT_LISTS, *FLAG_LISTS, *TOP_COLUMNS))


def require_no_clash(carried: Sequence[str]) -> None:
    """Refuses columns of the user that results need for themselves.

    Raises:
        InvalidRequest: names them.
    """
    clash = sorted(OWN_COLUMNS.intersection(carried))
    if clash:
        raise InvalidRequest(
            f"The input has columns that results use: {', '.join(clash)}.", "Rename them."
        )


def prompt_columns(prompt: Prompt | None) -> tuple[str | None, str | None]:
    """A prompt as it is stored.

    Returns:
        (text, form): the text itself with the form "text", else JSON with the form "messages" or "token_ids"; None and
        None for no prompt.
    """
    if prompt is None:
        return None, None
    if isinstance(prompt, str):
        return prompt, "text"

    form = "token_ids" if len(prompt) and isinstance(prompt[0], int) else "messages"
    return json.dumps(list(prompt), ensure_ascii=False), form


def prompt_of(text: str | None, form: str | None) -> Prompt | None:
    """The prompt that `prompt_columns` stored."""
    if text is None or form is None:
        return None
    return text if form == "text" else json.loads(text)


def record_of(completion: Completion, seed: int, layout: Layout) -> Record:
    """The record of a completion; its error is that of the request, not of the engine.

    Args:
        seed: the seed that its tokens were drawn with.
    """
    diagnostics, stop = completion.diagnostics, completion.stop_reason
    matrix = _matrix(diagnostics)
    record: Record = {
        "sample": completion.sample,
        "seed": seed % 2**64,
        "text": completion.text,
        "token_ids": np.asarray(completion.token_ids, np.int32),
        "finish_reason": completion.finish_reason,
        "stop_reason": None if stop is None else str(stop),
        "weights_changed": ", ".join(completion.weights_changed) or None,
        "error": completion.error,
        "prompt_tokens": completion.usage.prompt_tokens,
        "base_prompt_tokens": completion.usage.base_prompt_tokens,
        "completion_tokens": completion.usage.completion_tokens,
        **_scalars(matrix),
    }
    if layout.list_columns:
        record |= _lists_of(diagnostics, matrix, layout.diagnostics)
    if layout.top_logprobs:
        for side in TOP_SIDES:
            candidates = [getattr(top, side) for top in completion.top or ()]
            record |= _top(side, candidates)
    return record


def error_record(sample: int, seed: int, error: str, layout: Layout) -> Record:
    """The record of a completion that could not be made."""
    from midlogit.outputs import Usage

    completion = Completion(
        0,
        sample,
        None,
        None,
        [],
        [],
        "",
        [],
        "error",
        None,
        Usage(0, 0, 0, 0),
        Diagnostics(),
        error=error,
    )
    return record_of(completion, seed, layout)


def results_table(
    rows: pa.Table, numbers: Sequence[int], records: Sequence[Record], layout: Layout
) -> pa.Table:
    """The results of a part.

    Args:
        rows: the input rows of the part, with the columns row_id, prompts, forms, and those carried.
        numbers: the row of each record.
        records: in the order of the results.
    """
    import pyarrow as pa

    taken = rows.take(pa.array(numbers, pa.int64()))
    columns = [
        taken.column(field.name).cast(field.type)
        if field.name in taken.column_names
        else record_column(field, records)
        for field in layout.schema
    ]
    return pa.Table.from_arrays(columns, schema=layout.schema)


def record_column(field: pa.Field, records: Sequence[Record]) -> pa.Array:
    """One column of records, of those that `Layout.schema` names."""
    import pyarrow as pa

    if not pa.types.is_list(field.type):
        return pa.array([record[field.name] for record in records], field.type)
    if pa.types.is_list(field.type.value_type):
        return _nested(field, records)
    return _lists(field.type, [record[field.name] for record in records])


def records_of(table: pa.Table, layout: Layout) -> list[Record]:
    """The records in a table of results, in its order."""
    columns: dict[str, Sequence[Any]] = {}
    for field in layout.schema:
        if field.name in PLANNED_COLUMNS or field.name in layout.carried.names:
            continue
        column = table.column(field.name).combine_chunks()
        if field.name in layout.top_columns:
            positions = column.flatten()
            side = field.name.split("_")[1]
            columns[f"top_{side}_counts"] = _slices(column, positions.value_lengths())
            columns[field.name] = _slices(column, positions)
        elif field.name in (*layout.list_columns, "token_ids"):
            columns[field.name] = _slices(column, column.flatten())
        else:
            columns[field.name] = column.to_pylist()
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _slices(column: pa.ListArray, values: Any) -> list[np.ndarray[Any, Any]]:
    """The values of each list of a column as an array; lists of `values` are joined."""
    import pyarrow as pa

    ends = np.cumsum(column.value_lengths().to_numpy())[:-1]
    if pa.types.is_list(values.type):
        inner = np.concatenate(([0], np.cumsum(values.value_lengths().to_numpy())))
        ends, values = inner[ends], values.flatten()
    return np.split(values.to_numpy(zero_copy_only=False), ends)


def _matrix(diagnostics: Diagnostics) -> np.ndarray[Any, Any]:
    """All lists of numbers as one array, a row for each of FLOAT_LISTS; so they are converted once, and together."""
    return np.array([getattr(diagnostics, name) for name in FLOAT_LISTS], np.float64)


def _scalars(matrix: np.ndarray[Any, Any]) -> Mapping[str, float | None]:
    """Means, sums and extremes over the tokens of a completion; None for one without tokens."""
    if not matrix.size:
        return dict.fromkeys(SCALARS)

    sums = dict(zip(FLOAT_LISTS, matrix.sum(axis=1).tolist(), strict=True))
    rows = dict(zip(FLOAT_LISTS, matrix, strict=True))
    tokens = matrix.shape[1]
    return {
        "mean_alpha": sums["alpha"] / tokens,
        "mean_kl_base": sums["kl_base"] / tokens,
        "mean_kl_teacher": sums["kl_teacher"] / tokens,
        "max_kl": float(max(rows["kl_base"].max(), rows["kl_teacher"].max())),
        "mean_entropy": sums["entropy"] / tokens,
        "sum_logprob": sums["logprobs"],
        "sum_base_logprob": sums["base_logprobs"],
        "sum_teacher_logprob": sums["teacher_logprobs"],
        "sum_base_tempered_logprob": sums["base_tempered_logprobs"],
        "sum_teacher_tempered_logprob": sums["teacher_tempered_logprobs"],
        "sum_tv_bound": sums["tv_bound"],
        "min_coverage": float(rows["coverage"].min()),
    }


def _lists_of(
    diagnostics: Diagnostics, matrix: np.ndarray[Any, Any], level: DiagnosticsLevel
) -> Record:
    """The per-token columns, in the precision of their level."""
    stored = dict(zip(FLOAT_LISTS, matrix.astype(np.float32), strict=True))
    if level == "compact":
        for name in FLOAT_LISTS:
            stored[name] = stored[name] if name in LOGPROBS else _rounded(stored[name])
    flags = {name: np.array(getattr(diagnostics, name), np.bool_) for name in FLAG_LISTS}
    return {**stored, **flags}


def _rounded(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 with the mantissa rounded to COMPACT_BITS, which compresses better."""
    dropped = 23 - COMPACT_BITS
    bits = array.view(np.uint32) + np.uint32(1 << (dropped - 1))
    rounded = (bits & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).view(np.float32)
    return np.where(np.isfinite(array), rounded, array)


def _top(side: str, candidates: Sequence[Candidates]) -> Record:
    """Candidates of a completion: how many per position, and their ids and log-probabilities in one array each."""
    flat = [pair for position in candidates for pair in position]
    return {
        f"top_{side}_counts": np.asarray([len(position) for position in candidates], np.int32),
        f"top_{side}_ids": np.asarray([token_id for token_id, _ in flat], np.int32),
        f"top_{side}_logprobs": np.asarray([logprob for _, logprob in flat], np.float32),
    }


def _lists(kind: pa.DataType, arrays: Sequence[np.ndarray[Any, Any]]) -> pa.Array:
    """A column of lists, one per array."""
    import pyarrow as pa

    values = np.concatenate(arrays) if arrays else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(_offsets(map(len, arrays)), pa.array(values, kind.value_type))


def _nested(field: pa.Field, records: Sequence[Record]) -> pa.Array:
    """A column of candidates: per completion, per position, a list."""
    import pyarrow as pa

    side = field.name.split("_")[1]
    counts = [record[f"top_{side}_counts"] for record in records]
    values = np.concatenate([record[field.name] for record in records])
    kind = field.type.value_type
    positions = pa.ListArray.from_arrays(
        _offsets(np.concatenate(counts)), pa.array(values, kind.value_type)
    )
    return pa.ListArray.from_arrays(_offsets(map(len, counts)), positions)


def _offsets(lengths: Any) -> pa.Array:
    import pyarrow as pa

    ends = np.cumsum(np.fromiter(lengths, np.int64))
    return pa.array(np.concatenate(([0], ends)), pa.int32())
