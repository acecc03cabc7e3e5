"""Writes docs/cli.md from the commands' own help, or checks that it says what they say.

python docs/make_cli.py [--check]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
BATCH = [f"batch {name}" for name in ("run", "plan", "status", "retry", "verify", "export")]
COMMANDS = ("", "demo", "generate", "batch", *BATCH, "report", "serve", "doctor", "presets")
HEAD = """# The command line

Written by `python docs/make_cli.py` from the commands' own help; `make check` fails when it is out of date.

Exit codes: 0 done, 1 failure, 2 usage; 128 + the number of the signal that ended it: 130 for Ctrl-C, 143 for SIGTERM,
129 for SIGHUP. `batch` adds 4 for a job that is done with error rows, and 75 for one that a signal stopped with work
left ([batch.md](batch.md)). Results go to stdout, the rest to stderr, an error as one line.

## Prompts

`generate` takes prompts as arguments (after `--` if one begins with a dash), else from `--input FILE`, else from
standard input. A text has one prompt per line; blank lines are skipped, but count in line numbers. JSON lines are files
that end in .jsonl or .ndjson, and any input whose columns are named. They have one object per line: its `prompt`
(`--prompt-column`) is text, chat messages or token ids; without one, `messages` is used. `--base-prompt-column` is what
the base sees instead.

```json
{"prompt": "Once upon a time"}
{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
```

Input is UTF-8, with or without a byte order mark, unless `--encoding` says otherwise. Bytes of another encoding at
the beginning of an input (1,000 rows of a file, the first of a pipe) are reported before anything is loaded; further
on they are an error of their row. Files that end in .gz or .zst are decompressed.

Rows are read while others run, so an input may be of any length, and a pipe is answered as its rows come. At most
twice as many sequences as run at once (`--max-num-seqs`) are begun, and at most 16 times as many completions wait for
an earlier row to be printed; beyond that, reading waits. With `--seed`, about 100 bytes are kept of each different
prompt.

A prompt that cannot be honoured (too long, empty, no JSON, no messages) does not affect the others: it is a row with
finish_reason "error", an `error` that names its line and `error_type` "request", the others run, and the exit code is
1. `error_type` "engine" says that a server or the engine failed instead. With `--strict`, or if no argument can be
honoured, nothing runs, and the exit code is 2: a file is read twice, standard input is held in memory. An input that
cannot be read to its end (a damaged .gz) costs no row before: they are printed, then comes the error, and the exit
code is 2.

## Output

`generate --json` prints one object per completion, each on a line: `index` (which prompt), `sample` (which of n),
`prompt`, `base_prompt`, `prompt_token_ids` (the teacher's), `base_prompt_token_ids`, `text`, `token_ids`,
`finish_reason` (stop, length, abort, error), `stop_reason`, `usage` (`prompt_tokens`, `base_prompt_tokens`,
`completion_tokens`, `total_tokens`), and `diagnostics`: equal-length lists `alpha`, `kl_base`, `kl_teacher`, `entropy`,
`ess_base`, `ess_teacher`, `ess_ratio`, `logprobs`, `base_logprobs`, `teacher_logprobs`, `base_tempered_logprobs`,
`teacher_tempered_logprobs`, `base_support_logprobs`, `teacher_support_logprobs`, `base_support_logmass`,
`teacher_support_logmass`, `forced`, `coverage`, `alpha_bound`, `tv_bound`, `base_bounded`, `teacher_bounded`,
`base_tempered_bound`, `teacher_tempered_bound` (see [theory.md](theory.md), sections 9 and 10). Completions come in the
order of the prompts, each as soon as those before it are printed. JSON is UTF-8 whatever the encoding of the output;
in plain text, characters that it cannot hold become "?".

Ctrl-C, SIGTERM and SIGHUP end the run. Finished completions are printed, whole and once; in JSON also the unfinished
ones with the tokens generated so far and finish_reason "abort"; rows of an input that were not yet read are not. A
second signal does not wait for the latter. A full disk or a closed reader is one line and exit code 1; a partly
written row is removed from a file.

SIGKILL leaves no time for that. Rows of up to 4,096 bytes are still whole in a pipe on Linux. In a file, or where rows
are longer, the last may be cut, and then has no line end. `midlogit batch` keeps whole rows through any end.

## Seeds

With `--seed` the same prompt draws the same tokens, whatever other prompts the call holds. Different prompts, the `--n`
samples of a prompt, and a prompt that occurs several times in a call are independent draws; repetitions count as
further samples, in their order. Without `--seed` each prompt gets a fresh one.
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
