"""Runs the command line in a process of its own, forked from one that has imported what it needs.

Knows arguments, the two outputs and the exit code. Importing torch and transformers takes seconds, which most tests of
the command line need not pay again; those that look at the start of a process start one themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 300
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["tests.commands_imported"])


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `midlogit` with these arguments; its standard streams are files."""
    command = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(stdin)
        process = forks.Process(target=_run, args=(command, streams, dict(os.environ)))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, SECONDS)
        out, errors = (stream.read_text() for stream in streams[1:])
    return subprocess.CompletedProcess(command, process.exitcode, out, errors)


def _run(command: list[str], streams: list[Path], environment: dict[str, str]) -> None:
    """Becomes the command, in the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, flags) in enumerate(
        zip(streams, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        os.dup2(os.open(path, flags), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")
    )
    sys.argv = ["midlogit", *command]

    from midlogit.__main__ import run

    run()
