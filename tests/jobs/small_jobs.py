"""Small jobs that the bundled pair has run, for tests of what reads their results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midlogit import Pair, SamplingParams
from midlogit.jobs import Columns, Job, JobOptions, PairSource
from midlogit.requests.prompts import Prompt, Reading

TOO_LONG = "word " * 1200  # for the bundled pair's context
CHATS: list[Prompt] = [
    [{"role": "user", "content": "What is a lighthouse?"}],
    TOO_LONG,
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Name a colour."},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}],
]
TEXTS: list[Prompt] = ["Once upon a time", TOO_LONG, "The sea was calm, and", "A list of birds:"]
PARAMS = SamplingParams(n=2, max_tokens=40, seed=5, top_logprobs=20)
AS_PLAIN = Reading()


def planned(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    params: SamplingParams = PARAMS,
    reading: Reading = AS_PLAIN,
    columns: dict[str, Sequence[Any]] | None = None,
    diagnostics: Any = "full",
) -> Job:
    """A job of two rows per part, with ids row-0, row-1 and so on.

    Args:
        columns: further columns of its input; base_prompt is the base's.
    """
    columns = columns or {}
    rows = [
        {
            "id": f"row-{n}",
            "prompt": prompt,
            **{name: values[n] for name, values in columns.items()},
        }
        for n, prompt in enumerate(prompts)
    ]
    folder.mkdir(parents=True)
    lines = folder / "input.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = "base_prompt" if "base_prompt" in columns else None
    options = JobOptions(
        params,
        reading,
        Columns(base_prompt=own),
        diagnostics=diagnostics,
        rows_per_part=2,
        max_errors="100%",
    )
    return Job.plan([lines], folder / "RUN", PairSource("local"), options)


def run(pair: Pair, folder: Path, prompts: Sequence[Prompt], **options: Any) -> Job:
    """A complete job."""
    job = planned(folder, prompts, **options)
    assert job.run(pair, max_errors="100%")
    return job
