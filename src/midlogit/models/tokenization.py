"""Edges of tokenization: the ids put before a text, and the fewest tokens that it can become.

Knows encoders and the tokenizers library's parts; no model and no prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

PROBE = "a"
COMPOSED = 4  # most characters that a Unicode normal form writes as one (such as ᾂ)
NORMAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
KEEPING = {"Lowercase", "Prepend", "ByteLevel", "Strip", "Replace"} | NORMAL_FORMS
DROPPING_SPACES = {"Strip", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"}


def ids_before(encode: Callable[[str, bool], list[int]]) -> list[int]:
    """The ids, such as BOS, that an encoder puts before every text.

    Args:
        encode: a text to ids, with or without special tokens.
    """
    whole, plain = encode(PROBE, True), encode(PROBE, False)
    found = (k for k in range(len(whole) - len(plain) + 1) if whole[k : k + len(plain)] == plain)
    return whole[: next(found, 0)]


def undoubled(ids: list[int], before: list[int]) -> list[int]:
    """The ids of a text that may carry the ids put before it already: once."""
    return ids[len(before) :] if before and ids[: 2 * len(before)] == before * 2 else ids


@dataclass(frozen=True, slots=True)
class Density:
    """The most text that a token can hold.

    Attributes:
        characters: most characters of one token. spaces: whether white space always becomes tokens, too.
    """

    characters: int
    spaces: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Density | None:
        """Reads a tokenizer of the tokenizers library; None where one token can hold a text of any length.

        That is so where characters can be dropped, or an unknown text of any length becomes one token.
        """
        vocabulary = tokenizer.get_vocab()
        if not _spells_everything(tokenizer, vocabulary):
            return None

        normalizers = _parts(tokenizer.normalizer, "normalizers")
        steps = [*normalizers, *_parts(tokenizer.pre_tokenizer, "pretokenizers")]
        if not {part["type"] for part in normalizers} <= KEEPING or not all(map(_keeps, steps)):
            return None

        kinds = {part["type"] for part in steps}
        added = tokenizer.get_added_tokens_decoder().values()
        drops_spaces = bool(kinds & DROPPING_SPACES) or any(map(_shortens, steps))
        drops_spaces |= any(token.lstrip or token.rstrip for token in added)
        longest = max(map(len, vocabulary))
        return cls(longest * (COMPOSED if kinds & NORMAL_FORMS else 1), not drops_spaces)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the number of tokens of a text."""
        if not self.spaces:
            text = "".join(text.split())
        return -(-len(text) // self.characters)


def _parts(part: Any, key: str) -> list[dict[str, Any]]:
    """The descriptions of a normalizer or pre-tokenizer, a sequence taken apart."""
    if part is None:
        return []
    found = json.loads(part.__getstate__())
    return list(found[key]) if found["type"] == "Sequence" else [found]


def _spells_everything(tokenizer: Any, vocabulary: dict[str, int]) -> bool:
    """Whether every byte has a token of its own, so that no text is unknown."""
    model = tokenizer.model
    if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if model.byte_fallback:
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))

    parts = _parts(tokenizer.normalizer, "normalizers") + _parts(
        tokenizer.pre_tokenizer, "pretokenizers"
    )
    byte_level = any(part["type"] == "ByteLevel" for part in parts)
    return byte_level and all(piece in vocabulary for piece in ByteLevel.alphabet())


def _keeps(part: dict[str, Any]) -> bool:
    """Whether a step drops no character but white space."""
    if part["type"] == "Replace":
        pattern = part["pattern"].get("String")
        return pattern is not None and len("".join(pattern.split())) <= len(part["content"])
    return part["type"] != "CharDelimiterSplit" and part.get("behavior") != "Removed"


def _shortens(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and len(part["pattern"].get("String", "")) > len(
        part["content"]
    )
