"""Answers of vLLM's /tokenize and /detokenize; sends nothing.

The readers raise as those of `rows` where an answer cannot be used.
"""

from __future__ import annotations

from typing import Any

from midlogit.engines.http.client import BrokenAnswer


def read_ids(answer: Any) -> list[int]:
    """The ids of a text or of messages."""
    ids = answer["tokens"]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BrokenAnswer("it returned token ids that are none")
    if answer["count"] != len(ids):
        raise BrokenAnswer(f"it returned {len(ids)} of {answer['count']} token ids")
    return list(ids)


def read_text(answer: Any) -> str:
    """The text of ids."""
    text = answer["prompt"]
    if not isinstance(text, str):
        raise BrokenAnswer("it returned no text")
    return text
