"""Altered copies of the bundled pair, for what its own files do not show."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

from midlogit.pair import bundled
from midlogit.server.vocabulary import _byte_of_character

REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def sentencepiece(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The same ids in a SentencePiece-like vocabulary with byte fallback, as Llama 2, Mistral and Phi-3 have it.

    Spaces are part of the pieces, the first of a text is dropped, and bytes without a piece are `<0x..>`.
    """
    added = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary: dict[str, int] = {}
    names = {}
    for piece, token_id in tokenizer["model"]["vocab"].items():
        name = piece if piece in added else _sentencepiece_name(piece)
        while name in vocabulary:
            name += "~"
        vocabulary[name], names[piece] = token_id, name
    merges = [(names[a], names[b]) for a, b in tokenizer["model"]["merges"]]
    return {
        **tokenizer,
        "model": {
            **tokenizer["model"],
            "vocab": vocabulary,
            "merges": [[a, b] for a, b in merges if a + b in vocabulary],
            "byte_fallback": True,
            "fuse_unk": True,
        },
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]},
    }


def metaspace(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """`sentencepiece` with the Metaspace decoder and without byte fallback, as T5 has it."""
    changed = sentencepiece(tokenizer)
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    model = {**changed["model"], "byte_fallback": False}
    return {**changed, "model": model, "normalizer": None, "pre_tokenizer": scheme, "decoder": scheme}


def sentencepiece_pair(folder: Path) -> tuple[Path, Path]:
    """The bundled pair with `sentencepiece` vocabularies, below `folder`."""
    return _copied(folder, "base"), _copied(folder, "teacher")


def _copied(folder: Path, side: str) -> Path:
    copytree(bundled(side), folder / side)
    file = folder / side / "tokenizer.json"
    file.write_text(json.dumps(sentencepiece(json.loads(file.read_text()))))
    return folder / side


def _sentencepiece_name(piece: str) -> str:
    data = bytes(_byte_of_character()[c] for c in piece)
    if len(data) == 1 and not 0x20 <= data[0] < 0x7F:
        return f"<0x{data[0]:02X}>"
    try:
        return data.decode().replace(" ", "▁")
    except UnicodeDecodeError:
        return "".join(f"{{{byte:02x}}}" for byte in data)
