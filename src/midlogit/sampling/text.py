"""Token ids to text as they come: whole characters only, stop strings never leaked; knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 6


class TextStream:
    """The text of one completion.

    Attributes:
        text: all text released so far.
        stop_reason: the stop string that was met, None before.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self.text = ""
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer
        self._stop = stop
        self._context = [int(i) for i in prompt_ids[-CONTEXT_TOKENS:]]
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text that one more token releases; stop strings are looked for only where `may_stop`."""
        self._undecoded.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._undecoded.clear()
        return self._release(piece, may_stop)

    def finish(self) -> str:
        """What was held back, once it is known that nothing follows."""
        if self.stop_reason is not None:
            return ""
        released = self._release(self._tokenizer.decode(self._undecoded), True) if self._undecoded else ""
        if self.stop_reason is None:
            released, self.text, self._held = released + self._held, self.text + self._held, ""
        return released

    def _release(self, piece: str, may_stop: bool) -> str:
        held = self._held + piece
        stops = self._stop if may_stop else ()
        found = [(at, s) for s in stops if (at := held.find(s)) >= 0]
        if found:
            at, self.stop_reason = min(found)
            released, self._held = held[:at], ""
        else:
            keep = max((_overlap(held, s) for s in stops), default=0)
            released, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
