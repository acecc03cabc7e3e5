"""Verification of a job's results against its plan: every item once, checksums, schema; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from midlogit.jobs.manifest import Manifest
from midlogit.jobs.open_part import layout_of
from midlogit.jobs.part_files import part_name, read_metadata, read_part
from midlogit.jobs.run_folder import RunFolder

NAMED = 3


def problems(folder: RunFolder, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the results of a job, one sentence each; nothing for a job that is complete and sound."""
    done = folder.done()
    if missing := sorted(set(range(manifest.parts)) - done):
        names = ", ".join(map(part_name, missing[:NAMED]))
        yield f"{len(missing)} of {manifest.parts} parts are not done: {names}."
    for part in sorted(done - set(range(manifest.parts))):
        yield f"{part_name(part)} is not in the plan."
    for part in sorted(done & set(range(manifest.parts))):
        yield from _problems_of(folder, manifest, part)


def _problems_of(folder: RunFolder, manifest: Manifest, part: int) -> Iterator[str]:
    import pyarrow as pa

    name, path = part_name(part), folder.results_file(part)
    try:
        planned = read_part(folder.rows_file(part))
        results, metadata = read_part(path), read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        yield f"{name} cannot be read: {str(error).splitlines()[0]}"
        return

    if metadata.get("fingerprint") != manifest.fingerprint:
        yield f"{name} is of a job of other parameters."
    if not results.schema.equals(layout_of(manifest, planned.schema).schema):
        yield f"{name} has other columns than the job."

    expected = Counter(
        (row["row_id"], sample)
        for row in planned.select(["row_id", "samples"]).to_pylist()
        for sample in range(row["samples"])
    )
    found = Counter(
        zip(results.column("row_id").to_pylist(), results.column("sample").to_pylist(), strict=True)
    )
    for problem, items in (
        ("misses", expected - found),
        ("has besides the plan", found - expected),
    ):
        if items:
            names = ", ".join(f"row {row!r} sample {n}" for row, n in list(items)[:NAMED])
            yield f"{name} {problem} {items.total()} items: {names}."

    lengths = results.column("token_ids").combine_chunks().value_lengths()
    if not lengths.equals(results.column("completion_tokens").combine_chunks()):
        yield f"{name} has token ids of another number than completion_tokens says."
