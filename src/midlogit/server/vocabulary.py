"""Tokens as clients see them: their text, their bytes, where they begin in the text; knows one tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers.decoders import DecodeStream

from midlogit.checkpoint import Checkpoint

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The teacher's tokens; every answer's text and token names are made with them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer: Any = checkpoint.tokenizer.backend_tokenizer
        self._of = lru_cache(maxsize=None)(self._look_up)  # at most one entry an id

    def text(self, token_id: int, as_id: bool = False) -> str:
        """The token's own text; `bytes:\\x..` for a part of a character, which has no text of its own."""
        return f"token_id:{token_id}" if as_id else self._of(token_id)[0]

    def bytes(self, token_id: int) -> list[int]:
        """The token's UTF-8 bytes."""
        return self._of(token_id)[1]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def offsets(self, context: Sequence[int], start: int, *, special: bool) -> Offsets:
        """Where the tokens behind `context` begin, counted from `start`; `special`: special tokens have text."""
        return Offsets(self._tokenizer, context, start, special)

    def _look_up(self, token_id: int) -> tuple[str, list[int]]:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT not in text:
            return text, list(text.encode())
        piece = self._tokenizer.id_to_token(token_id) or ""
        data = _bytes_of(piece)
        if data is None:
            return text, list(text.encode())
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


class Offsets:
    """Where each token of a growing text begins, in characters."""

    def __init__(self, tokenizer: Any, context: Sequence[int], start: int, special: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(context[-6:]), skip_special_tokens=not special)
        self._at = start

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        here = self._at
        self._at += len(self._stream.step(self._tokenizer, token_id) or "")
        return here


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a byte-level or byte-fallback vocabulary piece, None for any other."""
    if match := BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    table = _byte_of_character()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else None


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte (GPT-2's table), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
