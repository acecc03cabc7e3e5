"""What a user runs where neither torch nor transformers is installed: BASE_URL TEACHER_URL FOLDER; prints JSON."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from midlogit import Completion, Pair, SamplingParams
from midlogit.jobs import Job, JobOptions, PairSource

PROMPTS = ["Once upon a time", [{"role": "user", "content": "Tell me a story."}], [5, 300, 7]]
PARAMS = SamplingParams.preset("exploratory", max_tokens=12, seed=3, top_logprobs=2)


def main(base: str, teacher: str, folder: Path) -> None:
    with Pair.http(base, teacher) as pair:
        found = pair.generate(PROMPTS, PARAMS, progress=False)
        later = asyncio.run(pair.agenerate(PROMPTS, PARAMS))
        assert [c.token_ids for c in later] == [c.token_ids for c in found]

        *tokens, whole = pair.stream(PROMPTS[0], PARAMS)
        assert isinstance(whole, Completion) and whole.token_ids == found[0].token_ids
        assert "".join(token.text for token in tokens) == whole.text

    inputs = folder / "prompts.txt"
    inputs.write_text("Once upon a time\nThe fox\n")
    source = PairSource("http", base, teacher)
    job = Job.plan([inputs], folder / "run", source, JobOptions(params=PARAMS))
    with source.open() as pair:
        assert job.run(pair)
    (table,) = job.tables(["text"])

    command = [sys.executable, "-m", "midlogit", "generate", "--base", base, "--teacher", teacher]
    command += ["--max-tokens", "12", "--seed", "3", "--preset", "exploratory", "Once upon a time"]
    told = subprocess.run(command, check=True, capture_output=True, text=True)

    heavy = [name for name in ("torch", "transformers", "jinja2") if name in sys.modules]
    print(
        json.dumps(
            {
                "token_ids": [c.token_ids for c in found],
                "texts": [c.text for c in found],
                "batch": table.column("text").to_pylist(),
                "command": told.stdout,
                "imported": heavy,
                "transformers": find_spec("transformers") is not None,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]))
