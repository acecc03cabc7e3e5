"""Chat templates rendered in a process of their own, with limits on time, memory and output.

Knows how to start, ask and end that process; it and its sandbox are `template_process.py`.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from midlogit.errors import InvalidRequest
from midlogit.extras import require

SECONDS = 10.0
MOST_CHARACTERS = 2**24
PROGRAM = Path(__file__).with_name("template_process.py")


class TemplateFailed(Exception):
    """What a template raised, or the limit that it went beyond."""


class TemplateProcess:
    """The process that renders; it starts with the first template, and again after one that had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._of_parent: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any], seconds: float = SECONDS) -> str:
        """The text of a template.

        Raises:
            TemplateFailed: it raises an error, takes too long or too much memory, or writes too much.
            InvalidRequest: variables that are no JSON.
        """
        try:
            asked = {"template": template, "variables": variables, "most": MOST_CHARACTERS}
            line = json.dumps(asked).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"A variable of the chat template is no JSON value: {error}.",
                "Give texts, numbers, lists and mappings.",
            ) from error

        with self._lock:
            answer = self._ask(line, seconds)
        if "error" in answer:
            raise TemplateFailed(answer["error"])
        return answer["text"]

    def _ask(self, line: bytes, seconds: float) -> dict[str, str]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return json.loads(answer)  # type: ignore[no-any-return]

        self.close()
        return {"error": f"it takes more than {seconds:g} s" if is_late.is_set() else "it crashed"}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            require("jinja2", "local")
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def close(self) -> None:
        """Ends the process, if it has not ended by itself."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def leave_to_parent(self) -> None:
        """Forgets the process after a fork: it answers to the parent."""
        self._of_parent, self._process, self._lock = self._process, None, threading.Lock()


_renderer = TemplateProcess()
atexit.register(_renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.leave_to_parent)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a chat template; see `TemplateProcess.render`."""
    return _renderer.render(template, variables)
