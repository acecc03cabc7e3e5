"""Planning a job: every input row read, checked and copied into parts; knows models without weights.

The plan is written beside RUN/plan and renamed when it is whole, so that it is there entirely or not at all. Edits of
the input cannot hurt later. The input is read twice: the first pass finds what is wrong and the types of the columns.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from midlogit import __version__
from midlogit.errors import InvalidRequest
from midlogit.jobs.checks import Checks
from midlogit.jobs.files import sync, unique_name
from midlogit.jobs.inputs import Row, read_rows
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.options import JobOptions, allowed_errors
from midlogit.jobs.part_files import part_name
from midlogit.jobs.schema import prompt_columns, require_no_clash
from midlogit.models.mixing import Mixing

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1024  # rows whose column types are found at once
NAMED = 5  # rows that a message names

PLAN_COLUMNS = {
    "row_id": "string",
    "prompt": "string",
    "prompt_form": "string",
    "base_prompt": "string",
    "base_prompt_form": "string",
    "samples": "int32",
    "overrides": "string",
    "where": "string",
    "row_error": "string",
}


@dataclass(slots=True)
class Findings:
    """What the first pass over the input found.

    Attributes:
        rows, items: numbers of rows and completions. carried: the Arrow schema of the columns that are carried through.
        wrong: "where: why" of the first rows that cannot be honoured.
        error_rows, error_items: their number, and that of their completions.
        uses_template: whether any prompt goes through a chat template.
    """

    rows: int = 0
    items: int = 0
    error_rows: int = 0
    error_items: int = 0
    wrong: list[str] = field(default_factory=list)
    carried: pa.Schema | None = None
    uses_template: bool = False


def write_plan(
    run: Path,
    inputs: Sequence[Path],
    parameters: dict[str, Any],
    options: JobOptions,
    mixing: Mixing,
) -> Manifest:
    """Plans a job into RUN/plan; where another process was faster, its plan stays.

    Raises:
        InvalidRequest: an input that cannot be read, ids that occur twice, no rows, or more rows that cannot be
            honoured than `max_errors` allows; names the first.
    """
    checks = Checks(mixing, options.params, options.reading)
    findings = _find(inputs, options, checks)
    if findings.error_items > allowed_errors(options.max_errors, findings.items):
        raise InvalidRequest(
            f"{findings.error_rows} of {findings.rows} rows cannot be honoured. {' '.join(findings.wrong)}",
            "Mend them, or allow them by --max-errors: they become error rows.",
        )

    manifest = Manifest(
        parameters=parameters,
        rows=findings.rows,
        items=findings.items,
        parts=-(-findings.rows // options.part_size),
        error_rows=findings.error_rows,
        rows_per_part=options.part_size,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=__version__,
        base=mixing.base.name,
        teacher=mixing.teacher.name,
    )
    draft = run / f"plan.{unique_name()}"
    draft.mkdir(parents=True)
    try:
        _write_rows(draft, inputs, options, checks, findings)
        manifest_file = draft / "manifest.json"
        manifest_file.write_bytes(manifest.to_json())
        sync(manifest_file)
        sync(draft)
        try:
            draft.rename(run / "plan")
        except OSError:
            if not (run / "plan").exists():
                raise
        sync(run)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def file_digests(inputs: Sequence[Path]) -> dict[str, str]:
    """The digest of each input file, by its name; those of a folder by their names inside it."""
    digests: dict[str, str] = {}
    for path in inputs:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = path.name if file == path else f"{path.name}/{file.relative_to(path)}"
            while name in digests:
                name += "'"
            try:
                with file.open("rb") as stream:
                    digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
            except OSError as error:
                raise InvalidRequest(f"Cannot read {file}: {error.strerror}.") from error
    return digests


def _find(inputs: Sequence[Path], options: JobOptions, checks: Checks) -> Findings:
    """The first pass over the input.

    Raises:
        InvalidRequest: ids that occur twice, columns that clash, no rows.
    """

    found = Findings()
    ids = array("Q")
    schemas: list[pa.Schema] = []
    for rows in _chunks(read_rows(inputs, options.columns, options.encoding), CHUNK):
        for row in rows:
            samples = checks.samples(row)
            found.rows += 1
            found.items += samples
            found.uses_template = found.uses_template or checks.uses_template(row)
            ids.append(_hash(row_id(row, found.rows - 1)))
            if (error := checks.error(row)) is not None:
                found.error_rows += 1
                found.error_items += samples
                if len(found.wrong) < NAMED:
                    found.wrong.append(f"{row.where}: {error}")
        schemas.append(_carried_schema(rows))
        if len(schemas) == CHUNK:
            schemas = [_unified(schemas)]

    if not found.rows:
        names = ", ".join(map(str, inputs))
        raise InvalidRequest(f"{names[0].upper()}{names[1:]} holds no prompt.", "Give some.")
    checks.require_variables_used(used=found.uses_template)
    found.carried = _unified(schemas)
    require_no_clash(found.carried.names)
    _require_unique(inputs, options, ids)
    return found


def _require_unique(inputs: Sequence[Path], options: JobOptions, hashes: array[int]) -> None:
    """Refuses ids that occur twice. Eight bytes per row find candidates; only those are compared as text.

    Raises:
        InvalidRequest: names the first.
    """
    found, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    suspects = set(found[counts > 1].tolist())
    if not suspects:
        return

    places: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(inputs, options.columns, options.encoding)):
        name = row_id(row, number)
        if _hash(name) in suspects:
            places.setdefault(name, []).append(row.where)
    twice = [
        f"{name!r} ({' and '.join(where[:2])})" for name, where in places.items() if len(where) > 1
    ]
    if twice:
        more = f" and {len(twice) - NAMED} more" * (len(twice) > NAMED)
        raise InvalidRequest(
            f"Ids occur more than once: {', '.join(twice[:NAMED])}{more}.",
            "Give each row an id of its own, or name another --id-column.",
        )


def _write_rows(
    folder: Path,
    inputs: Sequence[Path],
    options: JobOptions,
    checks: Checks,
    findings: Findings,
) -> None:
    """The second pass over the input: writes its rows as parts.

    Raises:
        InvalidRequest: the input changed since the first pass.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert findings.carried is not None
    written = 0
    rows = read_rows(inputs, options.columns, options.encoding)
    for part, chunk in enumerate(_chunks(rows, options.part_size)):
        own = pa.Table.from_pylist(
            [_plan_row(row, written + n, checks) for n, row in enumerate(chunk)],
            pa.schema(PLAN_COLUMNS.items()),
        )
        carried = _carried_table(chunk, findings.carried)
        path = folder / f"{part_name(part)}.parquet"
        pq.write_table(
            pa.Table.from_arrays(
                [*own.columns, *carried.columns], schema=pa.schema([*own.schema, *carried.schema])
            ),
            path,
            compression="zstd",
        )
        sync(path)
        written += len(chunk)
    if written != findings.rows:
        raise InvalidRequest("The input changed while it was read.", "Run the command again.")


def _plan_row(row: Row, number: int, checks: Checks) -> dict[str, Any]:
    error = checks.error(row)
    prompt, prompt_form = prompt_columns(row.prompt)
    base_prompt, base_prompt_form = prompt_columns(row.base_prompt)
    return {
        "row_id": row_id(row, number),
        "prompt": prompt,
        "prompt_form": prompt_form,
        "base_prompt": base_prompt,
        "base_prompt_form": base_prompt_form,
        "samples": checks.samples(row),
        "overrides": json.dumps(dict(row.overrides)) if row.overrides and error is None else None,
        "where": row.where,
        "row_error": error,
    }


def row_id(row: Row, number: int) -> str:
    """The id of a row: its own, else its number in the input."""
    if row.row_id is not None:
        return row.row_id
    return str(number) if row.error is None else f"#{number}"


def _carried_schema(rows: Sequence[Row]) -> pa.Schema:
    """The types of the carried columns in some rows; text (JSON) where the values are of several."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row.carried)
    fields = []
    for name in names:
        try:
            kind = pa.array([row.carried.get(name) for row in rows]).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            kind = pa.string()
        fields.append(pa.field(name, kind))
    return pa.schema(fields)


def _unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema for all rows: the wider type, and text where types have nothing in common."""
    import pyarrow as pa

    fields: dict[str, pa.Field] = {}
    for schema in schemas:
        for new in schema:
            old = fields.get(new.name, new)
            try:
                fields[new.name] = pa.unify_schemas(
                    [pa.schema([old]), pa.schema([new])], promote_options="permissive"
                ).field(0)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                fields[new.name] = pa.field(new.name, pa.string())
    return pa.schema(
        [f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in fields.values()]
    )


def _carried_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """The carried columns of some rows, values of mixed columns as text (JSON)."""
    import pyarrow as pa

    columns = []
    for column in schema:
        values = [row.carried.get(column.name) for row in rows]
        if pa.types.is_string(column.type):
            values = [
                v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values
            ]
        columns.append(pa.array(values, column.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _hash(name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
