"""Token ids to text as they come: whole characters only, stop strings never leaked; knows no model.

The text of a completion is what its ids add to the text of the prompt: decode(prompt + ids) without what it has in
common with the beginning of decode(prompt). Only the ids decide, not the pieces they come in:

- A character belongs to the id that completes it. Bytes of a character that the prompt leaves unfinished are the
  prompt's, shown there as U+FFFD. Where the first ids complete the character, it is the first of the completion; where
  they break it, the completion begins after it.
- Bytes that never become a character are shown as U+FFFD, as the tokenizer shows them, once it is known that they
  cannot be completed: at the next id that has other text, or at the end.
- Byte-fallback vocabularies (SentencePiece) show a run of byte pieces either as characters or, if one of its bytes is
  wrong, as one U+FFFD per byte. So a run is released when it has ended. The prompt's whole characters stay, whatever
  bytes follow.
- Special ids have no text, and the text around them is read as if they were not there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

CONTEXT_IDS = 4  # the bytes of the longest character: a character that the prompt leaves unfinished begins in these
MOST_HELD = 16  # ids that are decoded again and again while their text ends in U+FFFD
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(ABC):
    """Decodes ids; a subclass knows one tokenizer.

    Attributes:
        token: the text of one id inside a text, with its space, special ids included.
        first: the text of one id at the beginning of a text, where many tokenizers drop a space.
    """

    def __init__(self) -> None:
        self.token = lru_cache(maxsize=None)(
            self._token
        )  # at most one entry per id, as in the next
        self.first = lru_cache(maxsize=None)(self._first)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones included."""

    @abstractmethod
    def shows(self, token_id: int) -> bool:
        """Whether an id has text in a completion; special ids have none."""

    @abstractmethod
    def is_byte(self, token_id: int) -> bool:
        """Whether an id is a byte of a byte-fallback vocabulary, whose text depends on the bytes around it."""

    def decoding(self, prompt_ids: Sequence[int], live: bool) -> Decoding:
        """A new text after a prompt; unless `live`, nobody needs any of it before `Decoding.rest`."""
        return Decoding(self, prompt_ids, live)

    def _first(self, token_id: int) -> str:
        return self.decode((token_id,))

    def _token(self, token_id: int) -> str:
        alone = self.first(token_id)
        twice = self.decode((token_id, token_id))  # the second of two is inside a text
        return twice[len(alone) :] if twice.startswith(alone) else alone


class LocalDetokenizer(Detokenizer):
    """A tokenizer of the tokenizers library.

    Args:
        special: whether special ids have text.
    """

    def __init__(self, tokenizer: Any, special: bool = False) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        added = {} if special else tokenizer.get_added_tokens_decoder()
        self._hidden = frozenset(i for i, token in added.items() if token.special)
        self._bytes = frozenset(_byte_pieces(tokenizer))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def shows(self, token_id: int) -> bool:
        return token_id not in self._hidden and self._tokenizer.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        return token_id in self._bytes


class Decoding:
    """Ids to text, one id at a time, after a prompt.

    Attributes:
        pending: the text of the ids since the last piece, as it is if nothing follows; it ends in U+FFFD while a
            character is unfinished.
    """

    def __init__(self, detokenizer: Detokenizer, prompt_ids: Sequence[int], live: bool) -> None:
        self.pending = ""
        self._detokenizer = detokenizer
        self._prompt_ids: Sequence[int] | None = prompt_ids
        self._live = live
        self._window: list[
            int
        ] = []  # ids before the fresh ones, for what they do to the text of these
        self._fresh: list[int] = []  # ids that are not all told of
        self._known = ""  # the text of both that has been told
        self._run: _Run | None = None  # the byte pieces at the end of both

    def step(self, token_id: int) -> str:
        """The text that one more id settles."""
        if not self._detokenizer.shows(token_id):
            return ""
        if not self._live:
            self._fresh.append(token_id)
            return ""

        self._start(token_id)
        if self._detokenizer.is_byte(token_id):
            if self._run is None:
                self._run = _Run(
                    self._detokenizer, (self._window + self._fresh)[-1:], [], self.pending
                )
            self._fresh.append(token_id)
            self.pending = self._run.add(token_id)
            return ""

        self._fresh.append(token_id)
        self._run = None
        return self._settle(self._decode())

    def rest(self) -> str:
        """The text of the ids since the last piece, once it is known that nothing follows."""
        if not self._fresh:
            return ""

        self._start(self._fresh[0])
        now = self._decode()
        piece = now[common_length(self._known, now) :]
        self.pending, self._fresh = "", []
        return piece

    def _start(self, first_id: int) -> None:
        """Looks at the prompt, when text is first needed: decoding may ask a server."""
        if self._prompt_ids is None:
            return

        anchor, run = _context(self._detokenizer, self._prompt_ids, first_id)
        self._prompt_ids = None
        self._window = anchor + run
        self._known = self._detokenizer.decode(self._window) if self._window else ""
        self._run = _Run(self._detokenizer, anchor[-1:], run, "") if run else None

    def _decode(self) -> str:
        return self._detokenizer.decode(self._window + self._fresh)

    def _settle(self, now: str) -> str:
        """Takes what cannot change any more of the text of the window and the fresh ids."""
        settled = now.removesuffix(REPLACEMENT)
        piece = settled[common_length(self._known, settled) :]
        if settled == now:
            self._advance()
            return piece

        self.pending = REPLACEMENT
        if piece:
            self._known = settled
        if len(self._fresh) > MOST_HELD:
            ids = (self._window + self._fresh)[-2 * CONTEXT_IDS :]
            self._window, self._fresh = ids[:CONTEXT_IDS], ids[CONTEXT_IDS:]
            self._known = self._decode().removesuffix(REPLACEMENT)
        return piece

    def _advance(self) -> None:
        """Begins anew after text that is told of in full."""
        self.pending = ""
        self._window, self._fresh = self._fresh, []
        if len(self._window) == 1:
            self._known = self._detokenizer.first(self._window[0])
        else:
            self._known = self._detokenizer.decode(self._window)


class _Run:
    """A run of byte pieces: its text so far, without decoding it anew for every byte.

    Args:
        anchor: an id before the run, or none.
        begun: the bytes of an unfinished character with which it begins, not counted as its text.
        pending: text that waits before it.
    """

    def __init__(
        self, detokenizer: Detokenizer, anchor: list[int], begun: list[int], pending: str
    ) -> None:
        self._detokenizer = detokenizer
        self._anchor = anchor
        self._unfinished = list(begun)
        self._pending = pending
        self._text = ""
        self._size = 0

    def add(self, token_id: int) -> str:
        """Adds one byte; returns the pending text: characters, or U+FFFD per byte while one is unfinished."""
        self._size += 1
        self._unfinished.append(token_id)

        if (
            len(self._unfinished) <= CONTEXT_IDS
        ):  # longer ones are no character, and neither is what follows
            before = self._detokenizer.decode(self._anchor) if self._anchor else ""
            text = self._detokenizer.decode(self._anchor + self._unfinished)[len(before) :]
            if not text.endswith(REPLACEMENT):
                self._text += text
                self._unfinished.clear()

        return self._pending + (REPLACEMENT * self._size if self._unfinished else self._text)


def _context(
    detokenizer: Detokenizer, prompt_ids: Sequence[int], first_id: int
) -> tuple[list[int], list[int]]:
    """The last ids of a prompt that have text, and after them the byte pieces that `first_id` may change."""
    last: list[int] = []
    for token_id in map(int, reversed(prompt_ids)):
        if detokenizer.shows(token_id):
            last.append(token_id)
            if len(last) >= CONTEXT_IDS and not detokenizer.is_byte(token_id):
                break
    last.reverse()

    size = next((n for n, i in enumerate(reversed(last)) if not detokenizer.is_byte(i)), len(last))
    anchor, run = last[: len(last) - size], last[len(last) - size :]
    if not detokenizer.is_byte(first_id):
        return anchor, run

    for unfinished in range(min(size + 1, CONTEXT_IDS)):
        whole = run[: size - unfinished]
        if not detokenizer.decode(anchor + whole).endswith(REPLACEMENT):
            return anchor, run[size - unfinished :]
    return anchor, run


class TextStream:
    """The text of one completion.

    A stop string counts if it ends in the text of a token that may stop, wherever it begins. Of several the one that
    ends first counts, then the one named first: the text depends on the ids alone, not on the pieces.

    Args:
        prompt_ids: ids that it follows. stop: strings that end it.
        live: whether the text is needed while it grows; stop strings need it.

    Attributes:
        text: all text released so far.
        stop_reason: the stop string that was met, None before.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...],
        live: bool = True,
    ) -> None:
        self.text = ""
        self.stop_reason: str | None = None
        self._stop = stop
        self._decoding = detokenizer.decoding(prompt_ids, live)
        self._held = ""
        self._may_stop = True
        self._too_early = 0  # characters of the held text, and of what follows it, in which no stop string may end

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text that one more token releases; a stop string may end in it only where `may_stop`."""
        self._may_stop = may_stop
        piece = self._decoding.step(token_id)
        whole = "" if self._decoding.pending.endswith(REPLACEMENT) else self._decoding.pending
        if may_stop and whole and self._find(self._held + piece + whole) is not None:
            piece += self._decoding.rest()

        released = self._release(piece)
        if not may_stop:
            self._too_early = len(self._held) + len(whole)
        return released

    def finish(self) -> str:
        """Releases the text held back, once it is known that nothing follows."""
        if self.stop_reason is not None:
            return ""

        rest = self._decoding.rest()
        released = self._release(rest) if rest else ""
        if self.stop_reason is None:
            released, self.text, self._held = released + self._held, self.text + self._held, ""
        return released

    def _release(self, piece: str) -> str:
        if not self._stop:
            self.text += piece
            return piece

        held = self._held + piece
        found = self._find(held) if self._may_stop else None
        if found is not None:
            end, self.stop_reason = found
            released, self._held = held[: end - len(self.stop_reason)], ""
        else:
            keep = max((_overlap(held, s) for s in self._stop), default=0)
            released, self._held = held[: len(held) - keep], held[len(held) - keep :]
            self._too_early = max(self._too_early - len(released), 0)

        self.text += released
        return released

    def _find(self, held: str) -> tuple[int, str] | None:
        """Where the first stop string that counts ends in the held text, and which it is."""
        found = [(held.find(s, max(self._too_early + 1 - len(s), 0)), s) for s in self._stop]
        ends = [(at + len(s), s) for at, s in found if at >= 0]
        return min(ends, key=lambda end: end[0], default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def common_length(known: str, text: str) -> int:
    """Length of the longest common beginning."""
    if text.startswith(known):
        return len(known)
    return next((n for n, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), len(text))


def _byte_pieces(tokenizer: Any) -> list[int]:
    """Ids of the byte pieces that the tokenizer decodes as bytes, not as the text `<0x..>`."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = [(piece, tokenizer.token_to_id(piece)) for piece in pieces]
    return [
        i
        for piece, i in ids
        if i is not None and tokenizer.decode([i], skip_special_tokens=False) != piece
    ]
