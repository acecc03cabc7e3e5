"""Batch jobs against plain calls on one pair: tokens/s, memory of the coordinator, two GPUs against one.

    python -m benchmarks.batch                on the CPU: the bundled pair, 16 and 64 sequences at once
    python -m benchmarks.batch --memory       a fake engine: peak memory, rows/s of plan, run, status and verify
    python -m benchmarks.batch --gpu          on one GPU: Qwen3-4B and 14B without weights, 256 sequences
    python -m benchmarks.batch --gpus 2       two workers with a GPU each on one job, against one worker
    python -m benchmarks.batch --gpus 2 --engine local --rows 64          the bundled pair, to try the plumbing

Each writes its section of benchmarks/results/batch.json. Jobs have full diagnostics, and plans are written before the
time begins; journals, commits and reports of progress are in it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.batch_jobs import (
    RESULTS,
    Work,
    bundled_source,
    cpu_name,
    gpu_name,
    gpu_source,
    id_prompts,
    openings,
    write_section,
)
from benchmarks.batch_memory import measure_memory
from benchmarks.batch_ratio import compare
from benchmarks.batch_workers import measure_workers
from midlogit import SamplingParams

CPU_ROWS, CPU_SEQUENCES, CPU_TOKENS = 128, (16, 64), 128
GPU_ROWS, GPUS_ROWS, GPU_SEQUENCES, GPU_TOKENS, GPU_PROMPT = 1536, 1024, 256, 256, 128
BUNDLED_IDS, GPU_IDS = 4000, 100_000  # ids of prompts lie below


def cpu(chosen: argparse.Namespace) -> None:
    """The bundled pair on the CPU, texts as long as they come."""
    rows = []
    params = SamplingParams.preset("balanced", max_tokens=CPU_TOKENS, seed=1)
    for sequences in CPU_SEQUENCES:
        source = bundled_source("local", sequences)
        work = Work(source, openings(chosen.rows or CPU_ROWS), params, chat=False)
        with source.open() as pair, tempfile.TemporaryDirectory() as scratch:
            rows.append(compare(work, pair, chosen.rounds, Path(scratch)))
    write_section(chosen.output, "cpu", rows, cpu_name())


def gpu_work(chosen: argparse.Namespace, folder: Path, rows: int) -> Work:
    """Completions of one length on vLLM; with `--engine local` short ones of the bundled pair."""
    is_plumbing = chosen.engine == "local"
    source = (
        bundled_source("local", 16)
        if is_plumbing
        else gpu_source(folder, chosen.layers, GPU_SEQUENCES)
    )
    length, ids, tokens = (
        (16, BUNDLED_IDS, 32) if is_plumbing else (GPU_PROMPT, GPU_IDS, GPU_TOKENS)
    )
    params = SamplingParams.preset("balanced", max_tokens=tokens, seed=1, ignore_eos=True)
    return Work(source, id_prompts(rows, length, ids), params, chat=False)


def gpu(chosen: argparse.Namespace) -> None:
    """One GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        work = gpu_work(chosen, Path(scratch), chosen.rows or GPU_ROWS)
        with work.source.open() as pair:
            row = compare(work, pair, chosen.rounds, Path(scratch))
    write_section(chosen.output, "gpu", [row], gpu_name())


def gpus(chosen: argparse.Namespace) -> None:
    """Several GPUs, a worker on each."""
    with tempfile.TemporaryDirectory() as scratch:
        work = gpu_work(chosen, Path(scratch), chosen.rows or GPUS_ROWS)
        rows = measure_workers(work, chosen.gpus, chosen.rounds, Path(scratch))
    write_section(chosen.output, "gpus", rows, f"{chosen.gpus} × {gpu_name()}")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = options.add_mutually_exclusive_group()
    kind.add_argument("--memory", action="store_true", help="the coordinator's memory")
    kind.add_argument("--gpu", action="store_true", help="one GPU")
    kind.add_argument("--gpus", type=int, help="a worker on each of so many GPUs, against one")
    options.add_argument("--rows", type=int, help="rows of the job, for each GPU")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--layers", type=int, help="layers of both models, to try the plumbing")
    options.add_argument("--engine", choices=("vllm", "local"), default="vllm")
    options.add_argument("--output", type=Path, default=RESULTS)
    chosen = options.parse_args()

    if chosen.memory:
        write_section(chosen.output, "memory", measure_memory(), cpu_name())
    elif chosen.gpu:
        gpu(chosen)
    elif chosen.gpus:
        gpus(chosen)
    else:
        cpu(chosen)


if __name__ == "__main__":
    main()
