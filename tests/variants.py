"""Altered copies of the bundled pair, made below a folder: other tokenizer files, the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from midlogit import Pair
from midlogit.models.checkpoint import bundled
from midlogit.server.vocabulary import _byte_of_character

SIDES = ("base", "teacher")
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def copy_pair(folder: Path) -> Path:
    """The bundled pair below a folder that is not there yet."""
    for side in SIDES:
        shutil.copytree(bundled(side), folder / side)
    return folder


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file in place."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data, ensure_ascii=False))


def open_folders(folder: Path, **options: Any) -> Pair:
    return Pair.local(folder / "base", folder / "teacher", dtype="float32", device="cpu", **options)


def template() -> str:
    """The bundled teacher's chat template."""
    return str(
        json.loads((bundled("teacher") / "tokenizer_config.json").read_text())["chat_template"]
    )


def with_template(
    folder: Path, chat_template: object, sides: tuple[str, ...] = ("teacher",)
) -> Path:
    """Other chat templates."""
    copy_pair(folder)
    for side in sides:
        edit(
            folder / side / "tokenizer_config.json",
            lambda config: config.update(chat_template=chat_template),
        )
    return folder


def with_named_templates(folder: Path, *names: str) -> Path:
    """The teacher's template under several names; each writes its name first."""
    return with_template(
        folder, [{"name": name, "template": f"{name}: {template()}"} for name in names]
    )


def with_thinking(folder: Path, sides: tuple[str, ...] = ("teacher",)) -> Path:
    """A switch in the template, as Qwen3 has it."""
    return with_template(folder, thinking(template()), sides)


def thinking(chat_template: str) -> str:
    """The template with a switch that closes an empty thought."""
    off = "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    answer = "{{ '<|assistant|>' }}"
    return chat_template.replace(answer, answer + off)


def with_bos(folder: Path) -> Path:
    """A beginning-of-text token, id 2, before every text and in the teacher's template."""
    copy_pair(folder)

    def change_tokenizer(data: dict[str, Any]) -> None:
        next(token for token in data["added_tokens"] if token["id"] == 2)["content"] = "<s>"
        data["model"]["vocab"]["<s>"] = data["model"]["vocab"].pop("<|system|>")
        single = [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
        }

    def change_config(data: dict[str, Any]) -> None:
        data["bos_token"] = "<s>"
        data["additional_special_tokens"].remove("<|system|>")
        if "chat_template" in data:
            data["chat_template"] = "{{ bos_token }}" + data["chat_template"]

    for side in SIDES:
        edit(folder / side / "tokenizer.json", change_tokenizer)
        edit(folder / side / "tokenizer_config.json", change_config)
    return folder


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
        "decoder": {
            "type": "Sequence",
            "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP],
        },
    }


def metaspace(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """`sentencepiece` with the Metaspace decoder and without byte fallback, as T5 has it."""
    changed = sentencepiece(tokenizer)
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    model = {**changed["model"], "byte_fallback": False}
    return {
        **changed,
        "model": model,
        "normalizer": None,
        "pre_tokenizer": scheme,
        "decoder": scheme,
    }


def sentencepiece_pair(folder: Path) -> tuple[Path, Path]:
    """The bundled pair with `sentencepiece` vocabularies, below `folder`."""
    copy_pair(folder)
    for side in SIDES:
        edit(
            folder / side / "tokenizer.json",
            lambda tokenizer: tokenizer.update(sentencepiece(tokenizer)),
        )
    return folder / "base", folder / "teacher"


def _sentencepiece_name(piece: str) -> str:
    data = bytes(_byte_of_character()[c] for c in piece)
    if len(data) == 1 and not 0x20 <= data[0] < 0x7F:
        return f"<0x{data[0]:02X}>"
    try:
        return data.decode().replace(" ", "▁")
    except UnicodeDecodeError:
        return "".join(f"{{{byte:02x}}}" for byte in data)
