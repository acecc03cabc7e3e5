"""Jobs and results for the benchmarks of `midlogit batch`: inputs, plans, the file of figures; times nothing."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.common import COMMON, write_models
from midlogit import SamplingParams
from midlogit.delivery import Batch
from midlogit.jobs import Job, JobOptions, PairSource
from midlogit.pair import Pair
from midlogit.requests.prompts import Prompt, Reading

RESULTS = Path(__file__).parent / "results" / "batch.json"
VERSIONS = ("torch", "vllm", "transformers", "pyarrow", "numpy")


@dataclass(frozen=True)
class Work:
    """Prompts with the same parameters: as a job, or as one call of `Pair.as_completed`, with the same seeds.

    Attributes:
        chat: text prompts are user messages. rows_per_part: of the job.
    """

    source: PairSource
    prompts: Sequence[Prompt]
    params: SamplingParams
    chat: bool
    rows_per_part: int | None = None

    def plan(self, folder: Path, name: str) -> Job:
        """Plans the job below a folder."""
        rows = folder / f"{name}.jsonl"
        with rows.open("w") as file:
            for number, prompt in enumerate(self.prompts):
                file.write(json.dumps({"id": f"row-{number}", "prompt": prompt}) + "\n")
        options = JobOptions(
            params=self.params, reading=Reading(self.chat), rows_per_part=self.rows_per_part
        )
        return Job.plan([rows], folder / name, self.source, options)

    def start(self, pair: Pair) -> Batch:
        """The same requests in one call."""
        names = [f"row-{number}" for number in range(len(self.prompts))]
        return pair.as_completed(self.prompts, self.params, chat=self.chat, request_ids=names)


def openings(number: int) -> list[str]:
    """Beginnings of stories, all different."""
    return [f"Once upon a time there were {n} foxes. One day" for n in range(number)]


def id_prompts(number: int, length: int, ids: int) -> list[list[int]]:
    """Prompts of token ids below `ids`, all different."""
    return [
        [(37 * row + 11 * n + row // ids) % ids for n in range(length)] for row in range(number)
    ]


def gpu_source(folder: Path, layers: int | None, max_num_seqs: int) -> PairSource:
    """Models without weights in the shapes of Qwen3-4B and Qwen3-14B, on vLLM in lock-step."""
    folders = write_models(folder, layers)
    options = {**COMMON, "max_num_seqs": max_num_seqs, "speculation": "off"}
    return PairSource("vllm", folders["base"], folders["teacher"], options)


def bundled_source(engine: str, max_num_seqs: int) -> PairSource:
    """The bundled pair in lock-step, in float32."""
    options = {"max_num_seqs": max_num_seqs, "speculation": "off", "dtype": "float32"}
    if engine == "vllm":
        options["max_model_len"] = 256
    return PairSource(engine, options=options)  # type: ignore[arg-type]


def write_section(output: Path, name: str, rows: list[dict[str, Any]], device: str) -> None:
    """Prints the figures of one part of the benchmark, and puts them in the place of earlier ones in the file."""
    section = {
        "device": device,
        "versions": {
            "python": platform.python_version(),
            **{p: found for p in VERSIONS if (found := _version(p))},
        },
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.batch", *sys.argv[1:]]),
        "rows": rows,
    }
    print(json.dumps({name: section}, indent=2), flush=True)
    document = json.loads(output.read_text()) if output.exists() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**document, name: section}, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor, with the number of its threads that may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} threads"


def gpu_name() -> str:
    """The first GPU; the processor where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
