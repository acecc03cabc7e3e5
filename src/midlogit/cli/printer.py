"""Prints completions in the order of their rows, each as soon as all before it are printed; knows no engine.

What waits for an earlier row is kept as it will be printed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import orjson

from midlogit.cli.console import complain, write_json_line, write_text
from midlogit.outputs import Completion, Diagnostics, Token, Usage


class Printed(NamedTuple):
    """What is printed of a completion: a line of JSON or text, and the error if it ended with one."""

    output: bytes | str
    error: str | None


class Printer:
    """Prints the completions of rows that are announced in their order; tokens at once.

    Args:
        n: completions of each row. json: whether to print them as JSON. stream: whether their tokens are printed.

    Attributes:
        failed: whether a row ended with an error.
    """

    def __init__(self, n: int, *, json: bool, stream: bool) -> None:
        self.failed = False
        self._n, self._json, self._stream = n, json, stream
        self._where: dict[int, str] = {}
        self._ready: dict[tuple[int, int], Printed] = {}
        self._next = (0, 0)
        self._last_error = ""

    @property
    def num_waiting(self) -> int:
        """Completions that wait for an earlier row."""
        return len(self._ready)

    def expect(self, index: int, where: str) -> None:
        """Announces a row; `where` it came from is named in its errors."""
        self._where[index] = where

    def refuse(self, index: int, error: str) -> None:
        """Adds the completions of an announced row whose prompt could not be read."""
        for sample in range(self._n):
            self.add(_unreadable(index, sample, error))

    def add(self, event: Token | Completion) -> None:
        if isinstance(event, Token):
            write_text(event.text)
            return
        self._ready[event.index, event.sample] = self._printed(event)
        while self._next in self._ready:
            self._print(self._ready.pop(self._next))
            self._advance()

    def finish(self) -> None:
        """Prints the completions that wait for one that never came."""
        for key in sorted(self._ready):
            self._print(self._ready[key])
        self._ready.clear()

    def _advance(self) -> None:
        index, sample = self._next
        if sample + 1 < self._n:
            self._next = (index, sample + 1)
        else:
            del self._where[index]
            self._next = (index + 1, 0)

    def _printed(self, completion: Completion) -> Printed:
        is_error = completion.finish_reason == "error"
        error = f"{self._where[completion.index]}: {completion.error}" if is_error else None
        if self._json:
            # What was aborted is printed too: it was paid for, and finish_reason says what it is.
            completion = replace(completion, error=error)
            return Printed(orjson.dumps(completion.to_dict()), error)

        if self._stream:
            return Printed("\n" if completion.token_ids or not is_error else "", error)
        is_shown = completion.finish_reason != "abort" and (completion.text or not is_error)
        return Printed(completion.text + "\n" if is_shown else "", error)

    def _print(self, printed: Printed) -> None:
        if printed.error is not None:
            self._print_error(printed.error)
        if isinstance(printed.output, bytes):
            write_json_line(printed.output)
        elif printed.output:
            write_text(printed.output)

    def _print_error(self, error: str) -> None:
        """Prints an error, once for all samples of a row."""
        self.failed = True
        if error != self._last_error:
            complain(error)
        self._last_error = error


def _unreadable(index: int, sample: int, error: str) -> Completion:
    """The completion of a row whose prompt could not be read."""
    return Completion(
        index=index,
        sample=sample,
        prompt=None,
        base_prompt=None,
        prompt_token_ids=[],
        base_prompt_token_ids=[],
        text="",
        token_ids=[],
        finish_reason="error",
        stop_reason=None,
        usage=Usage(0, 0, 0, 0),
        diagnostics=Diagnostics(),
        error=error,
        error_type="request",
    )
