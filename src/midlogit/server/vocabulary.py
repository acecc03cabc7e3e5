"""Tokens as clients see them: text, bytes, offset in the text; knows one tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from midlogit.models.checkpoint import Checkpoint
from midlogit.models.detokenize import REPLACEMENT, Detokenizer, LocalDetokenizer, common_length

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The teacher's tokens, which give the text and the token names of every answer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer: Any = checkpoint.tokenizer.backend_tokenizer
        self._detokenizer = checkpoint.detokenizer
        self._all = LocalDetokenizer(self._tokenizer, special=True)
        self._of = lru_cache(maxsize=None)(self._look_up)  # at most one entry per id

    def text(self, token_id: int, as_id: bool = False) -> str:
        """The token's text within a longer one, with its space; `bytes:\\x..` for a part of a character."""
        return by_id(token_id) if as_id else self._of(token_id)[0]

    def bytes(self, token_id: int) -> list[int]:
        """The token's UTF-8 bytes."""
        return self._of(token_id)[1]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, with special tokens."""
        return self._all.decode(list(token_ids))

    def offsets(self, prompt_ids: Sequence[int]) -> Offsets:
        """Offsets of the tokens of a completion, from its own beginning."""
        return Offsets(self._detokenizer, prompt_ids, 0)

    def echo_offsets(self, start: int) -> Offsets:
        """Offsets of the tokens of a prompt, with special tokens, from `start`."""
        return Offsets(self._all, (), start)

    def shows(self, token_id: int) -> bool:
        """Whether a token has text in a completion."""
        return self._detokenizer.shows(token_id)

    def _look_up(self, token_id: int) -> tuple[str, list[int]]:
        text = self._all.token(token_id)
        data = (
            _bytes_of(self._tokenizer.id_to_token(token_id) or "") if REPLACEMENT in text else None
        )
        if data is None:
            return text, list(text.encode())
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


def by_id(token_id: int) -> str:
    """The name of a token by its id, in vLLM's form."""
    return f"token_id:{token_id}"


class Offsets:
    """The offset of each token of a growing text, in characters.

    A token that is a part of a character begins where the character does. If a run of byte pieces turns out not to be
    text, the offsets of its earlier tokens are not corrected.

    Args:
        prompt_ids: the ids before the text. start: the offset of the first token.
    """

    def __init__(self, detokenizer: Detokenizer, prompt_ids: Sequence[int], start: int) -> None:
        self._decoding = detokenizer.decoding(prompt_ids, live=True)
        self._shows: Callable[[int], bool] = detokenizer.shows
        self._told = start
        self._last = max(start, 0)

    def completion_begins(self, shows: Callable[[int], bool]) -> None:
        """Counts text only for tokens that `shows` names, from now on."""
        self._shows = shows

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        waiting = self._decoding.pending
        if self._shows(token_id):
            piece = self._decoding.step(token_id)
            whole = (
                piece
                if self._decoding.pending.endswith(REPLACEMENT)
                else piece + self._decoding.pending
            )
            here = self._told + common_length(waiting, whole)
            self._told += len(piece)
        else:
            here = self._told + len(waiting)
        self._last = max(self._last, here)
        return self._last


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
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
