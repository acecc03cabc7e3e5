"""Lines of `midlogit generate --json` as results of a job; knows both forms, no summaries.

A row's id is the number of its prompt. Lines are read in pieces of about a part, and again where a piece's rows are
asked for, so that a file of any size fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from midlogit.errors import InvalidRequest
from midlogit.jobs.options import COMPLETIONS_PER_PART
from midlogit.jobs.schema import Layout, prompt_columns, record_of, results_table
from midlogit.outputs import Completion, Diagnostics, Top, Usage

if TYPE_CHECKING:
    import pyarrow as pa

CANDIDATES = 20  # that are kept of a position
NO_LIST = {"logprobs": -math.inf, "kl_base": math.inf, "kl_teacher": math.inf, "ess_base": math.inf}
NO_LIST |= {"ess_teacher": math.inf, "base_logprobs": -math.inf, "teacher_logprobs": -math.inf}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines of a file.

    Attributes:
        start: of the first, in bytes. lines: how many. first: number of the first, from 1.
    """

    path: Path
    start: int
    lines: int
    first: int


def line_parts(path: Path) -> Iterator[Piece]:
    """The pieces of a file; the completions of one prompt, which are lines in a row, are in one piece.

    Raises:
        InvalidRequest: a line that `generate --json` did not write.
    """
    start = end = lines = total = 0
    before = None
    with path.open("rb") as file:
        for line in file:
            total += 1
            index = _parsed(path, total, line)["index"]
            if lines >= COMPLETIONS_PER_PART and index != before:
                yield Piece(path, start, lines, total - lines)
                start, lines = end, 0
            before, lines, end = index, lines + 1, end + len(line)
    if lines:
        yield Piece(path, start, lines, total - lines + 1)


def table_of_lines(piece: Piece) -> pa.Table:
    """The completions of a piece in the columns of results."""
    import pyarrow as pa

    with piece.path.open("rb") as file:
        file.seek(piece.start)
        data = [_parsed(piece.path, piece.first + n, file.readline()) for n in range(piece.lines)]
    top = any(line.get("top") for line in data)
    layout = Layout("full", CANDIDATES if top else 0, pa.schema([]))
    rows: dict[str, list[Any]] = {"row_id": [str(line["index"]) for line in data]}
    for name in ("prompt", "base_prompt"):
        pairs = [prompt_columns(line[name]) for line in data]
        rows[name], rows[f"{name}_form"] = [text for text, _ in pairs], [form for _, form in pairs]
    table = pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})
    records = [record_of(_completion(line), 0, layout) for line in data]
    return results_table(table, range(len(data)), records, layout)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        data = None
    if (
        not isinstance(data, dict)
        or not {"index", "sample", "diagnostics", "token_ids"} <= data.keys()
    ):
        raise InvalidRequest(
            f"{path}:{number} is no line of `midlogit generate --json`.",
            "Name the folder of a batch job, or a file of such lines.",
        )
    return data


def _completion(line: dict[str, Any]) -> Completion:
    given, length = line["diagnostics"], len(line["token_ids"])
    lists: dict[str, Any] = {
        field.name: [
            NO_LIST.get(field.name, math.nan) if value is None else value
            for value in given.get(field.name, [math.nan] * length)
        ]
        for field in fields(Diagnostics)
    }
    for name in ("forced", "base_bounded", "teacher_bounded"):
        lists[name] = [value is True for value in lists[name]]
    top = line.get("top") and [
        Top(**{side: [tuple(pair) for pair in candidates] for side, candidates in position.items()})
        for position in line["top"]
    ]
    own = {field.name for field in fields(Completion)}
    kept: dict[str, Any] = {"prompt_token_ids": [], "base_prompt_token_ids": []}
    kept |= {name: value for name, value in line.items() if name in own}
    return Completion(
        **kept | {"usage": Usage(**line["usage"]), "diagnostics": Diagnostics(**lists), "top": top}
    )
