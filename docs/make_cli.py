"""Writes docs/cli.md from the commands' own help, or checks that it says what they say.

python docs/make_cli.py [--check]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
COMMANDS = ("", "demo", "generate", "serve", "doctor", "presets")
HEAD = """# The command line

Written by `python docs/make_cli.py` from the commands' own help; `make check` fails when it is out of date.

Exit codes: 0 done, 1 failure, 2 usage, 130 interrupted. Results go to stdout, the rest to stderr.

`generate --json` prints one object a completion and line: `index` (which prompt), `sample` (which of n), `prompt`,
`base_prompt`, `text`, `token_ids`, `finish_reason` (stop, length, abort, error), `stop_reason`, `usage`
(`prompt_tokens`, `base_prompt_tokens`, `completion_tokens`, `total_tokens`), and `diagnostics`: equal-length lists
`alpha`, `kl_base`, `kl_teacher`, `entropy`, `ess_base`, `ess_teacher`, `ess_ratio`, `logprobs`, `base_logprobs`,
`teacher_logprobs`, `forced`, `coverage`, `alpha_bound`, `bound` (see [theory.md](theory.md), sections 9
and 10). Completions come in the
order of the prompts, each as soon as those before it are printed. Ctrl-C prints what was finished, and what the others
had with finish_reason "abort".
"""


def page() -> str:
    parts = [HEAD]
    for command in COMMANDS:
        # Not through a terminal and 100 columns wide, so that the text is the same everywhere.
        shown = subprocess.run(
            [sys.executable, "-m", "midlogit", *command.split(), "--help"],
            capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100", "TERM": "dumb"},
        ).stdout  # fmt: skip
        text = "\n".join(line.rstrip() for line in shown.strip().splitlines())
        parts.append(f"## midlogit {command}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(parts).replace("python -m midlogit", "midlogit")


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/cli.md is out of date: run python docs/make_cli.py")


if __name__ == "__main__":
    main()
