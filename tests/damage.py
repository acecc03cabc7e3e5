"""Damaged copies of the bundled pair: one fault per seed, in any file and at any level of it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.variants import SIDES, copy_pair

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 10**9, 2**31, 2**63, -(2**40), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "../x", "\n", "a/b", "\ud800", [], {}, [0], ["x"], {"a": 1}, [[]],
)  # fmt: skip
TEMPLATES = (
    "{{",
    "{% for m in messages %}",
    "{{ messages[99].content }}",
    "{{ raise_exception('no\nsuch') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 1 / 0 }}",
    "{{ messages | tojson }}{{ 'x' | nofilter }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "",
    "{{ [1, 2, 3] }}",
)
STRAY = (
    ("adapter_config.json", b'{"base_model_name_or_path": "elsewhere/model", "peft_type": "LORA"}'),
    ("pytorch_model.bin", b"\x80\x04."),
    ("special_tokens_map.json", b'{"eos_token": "never"}'),
    ("special_tokens_map.json", b'{"eos_token": 7, "pad_token": [1]}'),
    ("added_tokens.json", b'{"<new>": 4096, "<old>": -1}'),
    ("added_tokens.json", b"[1]"),
    ("chat_template.jinja", b"\xff\xfe"),
    ("chat_template.jinja", b"{% if %}"),
    ("model.safetensors.index.json", b'{"weight_map": {}}'),
    ("preprocessor_config.json", b"{"),
    ("modeling_llama.py", b"raise SystemExit('code was run')"),
)


def damaged_pair(folder: Path, seed: int) -> str:
    """Writes a pair with one fault into a folder that is not there yet; returns what was done."""
    rng = random.Random(seed)
    side = copy_pair(folder) / rng.choice(SIDES)
    if rng.random() < 0.15:
        shard(side)
    return rng.choice(FAULTS)(rng, side)


def shard(side: Path) -> None:
    """Splits the weights into two files with an index."""
    header, data = read_header(side / "model.safetensors")
    metadata, names = header.pop("__metadata__"), sorted(header)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file, new, offset, pieces = f"model-{number:05}-of-00002.safetensors", {}, 0, []
        for name in part:
            begin, end = header[name]["data_offsets"]
            new[name] = header[name] | {"data_offsets": [offset, offset + end - begin]}
            pieces.append(data[begin:end])
            offset, weight_map[name] = offset + end - begin, file
        write_header(side / file, {"__metadata__": metadata, **new}, b"".join(pieces))
    (side / "model.safetensors").unlink()
    index = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    (side / "model.safetensors.index.json").write_text(json.dumps(index))


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _any_file(rng: random.Random, side: Path) -> Path:
    return rng.choice(sorted(side.iterdir()))


def _json_file(rng: random.Random, side: Path) -> Path:
    return rng.choice(sorted(side.glob("*.json")) + [side / "config.json"] * 3)


def _weights(rng: random.Random, side: Path) -> Path:
    return rng.choice(sorted(side.glob("*.safetensors")))


def cut(rng: random.Random, side: Path) -> str:
    file = _any_file(rng, side)
    content = file.read_bytes()
    size = rng.randrange(len(content))
    file.write_bytes(content[:size])
    return f"{file.name} cut to {size} bytes"


def flip(rng: random.Random, side: Path) -> str:
    """A few bytes, most often near the beginning, where headers are."""
    file = _any_file(rng, side)
    content = bytearray(file.read_bytes())
    limit = rng.choice([16, 500, len(content)])
    places = [rng.randrange(min(limit, len(content))) for _ in range(rng.randint(1, 4))]
    for place in places:
        content[place] = rng.randrange(256)
    file.write_bytes(content)
    return f"{file.name} changed at {places}"


def lengthen(rng: random.Random, side: Path) -> str:
    file = _any_file(rng, side)
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice([1, 8, 1000])))
    return f"{file.name} lengthened"


def remove(rng: random.Random, side: Path) -> str:
    file = _any_file(rng, side)
    file.unlink()
    return f"{file.name} removed"


def swap(rng: random.Random, side: Path) -> str:
    """Files of one side for those of the other, or for another file of the same."""
    file = _any_file(rng, side)
    others = [
        *sorted(side.iterdir()),
        *(side.parent / other / file.name for other in SIDES if other != side.name),
    ]
    other = rng.choice([path for path in others if path != file and path.exists()])
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)
    return f"{file.name} swapped with {other.parent.name}/{other.name}"


def stray(rng: random.Random, side: Path) -> str:
    name, content = rng.choice(STRAY)
    (side / name).write_bytes(content)
    return f"{name} added"


def template(rng: random.Random, side: Path) -> str:
    text = rng.choice(TEMPLATES)
    file = side / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": text}))
    return f"chat template {text!r}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON value, of long parts the first and last ones."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = []
    for key, part in items[:40] + items[40:][-5:]:
        found.append((*path, key))
        if isinstance(part, dict | list):
            found += _places(part, (*path, key))
    return found


def change(rng: random.Random, side: Path) -> str:
    """A value, a key or a part of a JSON file."""
    file = _json_file(rng, side)
    data = json.loads(file.read_text())
    path = rng.choice(_places(data))
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]

    kinds = ["odd", "odd", "remove", "near"] + ["rename"] * isinstance(parent, dict)
    kind = rng.choice(kinds)
    if kind == "odd":
        parent[key] = rng.choice(ODD)
    elif kind == "remove":
        del parent[key]
    elif kind == "rename":
        parent[str(key) + rng.choice(["_", "s", ".0"])] = parent.pop(key)
    elif isinstance(value, int):
        parent[key] = value + rng.choice([-1, 1, 7, value])
    else:
        parent[key] = [value] if rng.random() < 0.5 else str(value)[:50]
    file.write_text(json.dumps(data))
    return f"{file.name}: {kind} at {path}"


def tensor(rng: random.Random, side: Path) -> str:
    """The header of the weights: names, shapes, dtypes and offsets."""
    file = _weights(rng, side)
    header, data = read_header(file)
    name = rng.choice(sorted(header))
    entry = header[name]
    kind = rng.choice(["rename", "remove", "shape", "dtype", "offsets", "copy", "exchange"])
    if name == "__metadata__" or kind == "remove":
        header.pop(name)
    elif kind == "rename":
        header[rng.choice([name + "_", name.removeprefix("model."), "lm_head.weight"])] = (
            header.pop(name)
        )
    elif kind == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [1], [2**40], []])
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "I16", "U16", "F32", "BOOL", "Q4", "F8_E4M3"])
    elif kind == "offsets":
        entry["data_offsets"] = [n + rng.choice([-2, 2, 1]) for n in entry["data_offsets"]]
    elif kind == "copy":
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        new = rng.choice(["lm_head.weight", "model.layers.9.mlp.up_proj.weight", "x"])
        header[new] = entry | {"data_offsets": [len(data), len(data) + size]}
        data += (
            rng.randbytes(size // 2 * 2)
            if rng.random() < 0.5
            else data[slice(*entry["data_offsets"])]
        )
        kind += f" to {new}"
    else:
        other = rng.choice([n for n in sorted(header) if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
        kind += f" with {other}"
    write_header(file, header, data)
    return f"{file.name}: {kind} {name}"


def index(rng: random.Random, side: Path) -> str:
    """The index of sharded weights."""
    if not (side / "model.safetensors.index.json").exists():
        shard(side)
    file = side / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    names = data["weight_map"]
    name = rng.choice(sorted(names))
    kind = rng.choice(["outside", "absolute", "missing", "remove", "rename", "other", "type"])
    if kind == "outside":
        other = "teacher" if side.name == "base" else "base"
        names[name] = f"../{other}/model.safetensors"
    elif kind == "absolute":
        names[name] = str(side / names[name])
    elif kind == "missing":
        names[name] = "model-00003-of-00003.safetensors"
    elif kind == "remove":
        del names[name]
    elif kind == "rename":
        names[name + "_"] = names.pop(name)
    elif kind == "other":
        names[name] = next(f for f in sorted(set(names.values())) if f != names[name])
    else:
        names[name] = rng.choice([None, 7, ["x"], ""])
    file.write_text(json.dumps(data))
    return f"index: {kind} {name}"


def tokens(rng: random.Random, side: Path) -> str:
    """The vocabulary and merges of the tokenizer."""
    file = side / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary, merges, added = (
        data["model"]["vocab"],
        data["model"]["merges"],
        data["added_tokens"],
    )
    token = rng.choice(sorted(vocabulary))
    kind = rng.choice(["id", "exchange", "remove", "merge", "added", "new"])
    if kind == "id":
        vocabulary[token] = rng.choice([4096, 4095, 0, 2**31, 2**32 - 1, -1])
    elif kind == "exchange":
        other = rng.choice(sorted(vocabulary))
        vocabulary[token], vocabulary[other] = vocabulary[other], vocabulary[token]
    elif kind == "remove":
        del vocabulary[token]
    elif kind == "merge":
        merges[rng.randrange(len(merges))] = rng.choice([["a", "zzz"], "a b c", [], ["a"]])
    elif kind == "added":
        rng.choice(added).update(id=rng.choice([4096, 10**6, 7, 2**32 - 1]))
    else:
        added.append(
            added[0] | {"id": rng.choice([4096, 2**31]), "content": rng.choice(["a", "<new>"])}
        )
    file.write_text(json.dumps(data))
    return f"tokenizer.json: {kind} {token!r}"


FAULTS: tuple[Callable[[random.Random, Path], str], ...] = (
    cut, flip, flip, lengthen, remove, swap, stray, template,
    change, change, change, change, tensor, tensor, tensor, index, tokens, tokens,
)  # fmt: skip
