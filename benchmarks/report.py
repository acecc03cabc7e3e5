"""Time and peak memory of reports: a million rows, alone and against another million; numbers and pages both.

python -m benchmarks.report [--rows 1000000] [--folder FOLDER]

The rows are synthetic, in the parts of a job: their footers are summaries of such rows, sixteen different ones in turn,
so that they are as large as real ones. Each report runs as a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from midlogit import SamplingParams
from midlogit.jobs.manifest import Manifest, sampling_facts
from midlogit.jobs.part_files import part_name, write_part
from midlogit.jobs.schema import FLAG_LISTS, FLOAT_LISTS, LOGPROBS, SCALARS, Layout
from midlogit.jobs.summary import SUMMARY_VERSION, summarize

RESULTS = Path(__file__).parent / "results" / "report.json"
ROWS_PER_PART, SAMPLES, TEMPLATES, TOKENS = 1024, 4, 16, 32
MEASURED = """
import json, resource, sys, time
begun = time.perf_counter()
from midlogit.report import make_report
report = make_report(*sys.argv[1:])
read = time.perf_counter() - begun
size = len(report.page().encode())
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "seconds": time.perf_counter() - begun, "processor_s": used.ru_utime + used.ru_stime, "read_s": read,
    "peak_gb": used.ru_maxrss * 1024 / 1e9, "page_mb": size / 1e6,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        runs = [folder / name for name in ("one", "two")]
        for seed, run in enumerate(runs):
            if not run.exists():
                write_run(run, given.rows, seed)
        rows = [
            {"rows": given.rows, "runs": count, "tokens_per_row": TOKENS, **measured(runs[:count])}
            for count in (1, 2)
        ]
    versions = {name: version(name) for name in ("pyarrow", "numpy", "vl-convert-python")}
    report = {
        "device": f"{platform.processor() or platform.machine()}, {given.rows} rows",
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.report", *sys.argv[1:]]),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def measured(runs: list[Path]) -> dict[str, Any]:
    """Seconds, peak memory and size of the page of one report."""
    line = [sys.executable, "-c", MEASURED, *map(str, runs)]
    found: dict[str, Any] = json.loads(
        subprocess.run(line, check=True, capture_output=True, text=True).stdout
    )
    return found


def write_run(run: Path, rows: int, seed: int) -> None:
    """Writes a complete job of synthetic rows."""
    generator = np.random.default_rng(seed)
    layout = Layout("full", 0, pa.schema([]))
    templates = []
    for _ in range(TEMPLATES):
        table = synthetic(generator, layout)
        templates.append((table, orjson.dumps(summarize(table))))

    parts = -(-rows // ROWS_PER_PART)
    for number in range(parts):
        table, summary = templates[number % TEMPLATES]
        table = table.slice(0, min(ROWS_PER_PART, rows - number * ROWS_PER_PART))
        name = f"{number:06}"
        ids = pa.array([text.replace("PPPPPP", name) for text in table["row_id"].to_pylist()])
        metadata = {
            "part": number,
            "started": time.time() - 60,
            "ended": time.time(),
            "summary_version": SUMMARY_VERSION,
            "summary": orjson.loads(summary.replace(b"PPPPPP", name.encode())),
        }
        path = run / "data" / f"{part_name(number)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_part(path, run / "tmp", table.set_column(0, "row_id", ids), metadata)
    (run / "plan").mkdir()
    (run / "plan" / "manifest.json").write_bytes(manifest(rows, parts, seed).to_json())
    for name in ("journal", "claims", "workers", "attempts"):
        (run / name).mkdir()


def manifest(rows: int, parts: int, seed: int) -> Manifest:
    model = {"context": 4096}
    parameters = {
        "inputs": {"synthetic": "0"}, "engine": "local", "dtype": "auto", "base": model, "teacher": model,
        "sampling": sampling_facts(SamplingParams(n=SAMPLES, seed=seed, max_tokens=2 * TOKENS)),
        "reading": {"chat": False, "chat_template_kwargs": None, "add_special_tokens": True}, "diagnostics": "full",
    }  # fmt: skip
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Manifest(
        parameters, rows // SAMPLES, rows, parts, 0, ROWS_PER_PART // SAMPLES, created, "0.1.0"
    )


def synthetic(generator: np.random.Generator, layout: Layout) -> pa.Table:
    """The results of a part: lengths, divergences and α spread as those of real models are."""
    lengths = generator.integers(1, 2 * TOKENS, ROWS_PER_PART)
    total = int(lengths.sum())
    kl = generator.lognormal(-3, 1.2, total)
    lists = {
        "alpha": np.clip(generator.normal(0.5, 0.08, total), 0, 1),
        "kl_base": kl,
        "kl_teacher": kl + generator.normal(0, 1e-7, total),
        "entropy": generator.gamma(2.0, 0.8, total),
        "ess_base": np.exp(-2 * kl),
        "ess_teacher": np.exp(-2.1 * kl),
        "coverage": np.ones(total),
    }
    logprobs = -generator.gamma(2.0, 0.8, total)
    for name in FLOAT_LISTS:
        noise = generator.normal(0, 0.3, total) if "logprob" in name else np.zeros(total)
        lists.setdefault(name, logprobs + noise if "logprob" in name else noise)

    starts = np.cumsum(lengths) - lengths
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
    rows = ROWS_PER_PART // SAMPLES
    values: dict[str, Any] = {
        "row_id": [f"row-PPPPPP-{row:04}" for row in range(rows) for _ in range(SAMPLES)],
        "sample": np.tile(np.arange(SAMPLES), rows),
        "seed": np.zeros(ROWS_PER_PART, np.uint64),
        "prompt": ["What is a lighthouse?"] * ROWS_PER_PART,
        "prompt_form": ["text"] * ROWS_PER_PART,
        "text": [f"The lighthouse {generator.integers(10**9)}" for _ in range(ROWS_PER_PART)],
        "finish_reason": np.where(lengths < 2 * TOKENS - 2, "stop", "length"),
        "prompt_tokens": np.full(ROWS_PER_PART, 9),
        "base_prompt_tokens": np.full(ROWS_PER_PART, 9),
        "completion_tokens": lengths,
    }
    sums = {name: np.add.reduceat(lists[name], starts) for name in FLOAT_LISTS}
    scalars = {
        "max_kl": np.maximum.reduceat(lists["kl_base"], starts),
        "min_coverage": np.ones(ROWS_PER_PART),
        "sum_tv_bound": sums["tv_bound"],
    } | {f"sum_{name}"[:-1]: sums[name] for name in LOGPROBS}
    for name in ("alpha", "kl_base", "kl_teacher", "entropy"):
        scalars[f"mean_{name}"] = sums[name] / lengths
    values |= {name: scalars[name] for name in SCALARS}

    columns = []
    for field in layout.schema:
        if field.name in values:
            columns.append(pa.array(values[field.name]).cast(field.type))
        elif pa.types.is_list(field.type):
            if field.name == "token_ids":
                flat = pa.array(generator.integers(0, 4000, total), pa.int32())
            elif field.name in FLAG_LISTS:
                first = np.zeros(total, bool)
                first[starts] = field.name == "forced"
                flat = pa.array(first)
            else:
                flat = pa.array(lists[field.name], pa.float32())
            columns.append(pa.ListArray.from_arrays(offsets, flat))
        else:
            columns.append(pa.nulls(ROWS_PER_PART, field.type))
    return pa.Table.from_arrays(columns, schema=layout.schema)


if __name__ == "__main__":
    main()
