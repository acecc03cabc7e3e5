"""Token ids to text as they come: whole characters only, stop strings never leaked; knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 6


class Decoding(Protocol):
    """Ids to text, one id at a time, behind some context."""

    def step(self, token_id: int) -> str | None:
        """The text that one more id adds; None while a character is not complete."""

    def rest(self) -> str:
        """The text of the ids since the last step that returned some; once."""


class Detokenizer(Protocol):
    """What turns ids into text."""

    def decoding(self, context: Sequence[int], live: bool) -> Decoding:
        """A new text behind `context`; unless `live`, nobody needs any of it before `rest`."""

    def token(self, token_id: int) -> str:
        """The text of one id, special ones included."""


class LocalDetokenizer:
    """A tokenizer of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decoding(self, context: Sequence[int], live: bool) -> Decoding:
        return LocalDecoding(self._tokenizer, context)

    def token(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))


class LocalDecoding:
    """`Decoding` by the tokenizers library."""

    def __init__(self, tokenizer: Any, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=True)
        self._undecoded: list[int] = []

    def step(self, token_id: int) -> str | None:
        self._undecoded.append(token_id)
        piece: str | None = self._stream.step(self._tokenizer, token_id)
        if piece is not None:
            self._undecoded.clear()
        return piece

    def rest(self) -> str:
        undecoded, self._undecoded = self._undecoded, []
        return str(self._tokenizer.decode(undecoded)) if undecoded else ""


class TextStream:
    """The text of one completion.

    Args:
        prompt_ids: what it follows. stop: strings that end it.
        live: whether the text is needed while it grows; stop strings need it.

    Attributes:
        text: all text released so far.
        stop_reason: the stop string that was met, None before.
    """

    def __init__(
        self, detokenizer: Detokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...], live: bool = True
    ) -> None:
        self.text = ""
        self.stop_reason: str | None = None
        self._stop = stop
        self._decoding = detokenizer.decoding([int(i) for i in prompt_ids[-CONTEXT_TOKENS:]], live)
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text that one more token releases; stop strings are looked for only where `may_stop`."""
        piece = self._decoding.step(token_id)
        return "" if piece is None else self._release(piece, may_stop)

    def finish(self) -> str:
        """What was held back, once it is known that nothing follows."""
        if self.stop_reason is not None:
            return ""
        rest = self._decoding.rest()
        released = self._release(rest, True) if rest else ""
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
