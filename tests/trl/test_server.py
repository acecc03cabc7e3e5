"""Runs check_server.py in a process in which TRL finds vLLM: it asks for it before it talks to a server.

There it is a stub (tests/trl/stub), which sends weights by a file in place of NCCL; all else is TRL's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_trls_unmodified_server_mode() -> None:
    path = os.pathsep.join([str(HERE / "stub"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "check_server.py"],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
