"""The server's log lines, as text or JSON on standard error; knows secrets, and redacts them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

from midlogit import lines

logger = logging.getLogger("midlogit.server")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class Redaction:
    """Replaces secrets and folder names in logs and responses."""

    def __init__(self) -> None:
        self._hidden: dict[str, str] = {}

    def hide(self, text: str, shown: str) -> None:
        """Replaces `text` by `shown` from now on."""
        if text:
            self._hidden[text] = shown

    def __call__(self, text: str) -> str:
        for hidden in sorted(self._hidden, key=len, reverse=True):
            text = text.replace(hidden, self._hidden[hidden])
        return text


class LineFormatter(logging.Formatter):
    """One line per record: time, level, request id, message and the record's `facts`."""

    def __init__(self, as_json: bool, redact: Callable[[str], str]) -> None:
        super().__init__()
        self._as_json = as_json
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **({"request_id": request_id.get()} if request_id.get() else {}),
            **facts,
        }
        if self._as_json:
            return self._redact(orjson.dumps(line, default=str).decode())
        rest = " ".join(f"{name}={value}" for name, value in list(line.items())[3:])
        text = f"{line['time']} {line['level']:<7} {line['message']} {rest}".rstrip()
        return self._redact(text.encode("unicode_escape").decode())


class LineHandler(logging.StreamHandler[Any]):
    """Writes each line whole, or where the disk is full none of it: a log of JSON stays one.

    Whoever logs hears of no error: a request is answered where standard error is closed too.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record) + self.terminator)
        except Exception:
            self.handleError(record)

    def _write(self, line: str) -> None:
        try:
            descriptor = self.stream.fileno()
        except (AttributeError, OSError):  # a stream without a file
            self.stream.write(line)
            return
        with suppress(OSError):
            lines.append(descriptor, line.encode(errors="backslashreplace"))


def set_up(as_json: bool, redact: Callable[[str], str]) -> None:
    """Sends the server's lines and uvicorn's warnings to standard error."""
    handler = LineHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json, redact))
    for name, level in (("midlogit.server", logging.INFO), ("uvicorn.error", logging.WARNING)):
        named = logging.getLogger(name)
        named.handlers, named.propagate = [handler], False
        named.setLevel(level)


def where(error: BaseException) -> str:
    """The file and line that raised, without folders."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "unknown place"
    name = trace.tb_frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"{name}:{trace.tb_lineno}"
