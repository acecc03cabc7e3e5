"""Model folders with damaged files: one typed error that names the folder, from every reader of it."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest

from midlogit import ModelUnavailable
from midlogit.cli.doctor import run_doctor
from midlogit.cli.loading import PairOptions
from midlogit.models.checkpoint import Checkpoint
from tests.conftest import BASE


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[1]"),
        ("tokenizer.json", b"\xff\xfe\0"),
        ("tokenizer_config.json", b"[]"),
        ("config.json", b"{}"),
        ("config.json", b"\xff\xfe"),
        ("config.json", None),
        ("generation_config.json", b"[]"),
        ("generation_config.json", b'{"eos_token_id": "x"}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"garbage" * 9),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = copytree(BASE, tmp_path / "model")
    if content is None:  # values of a wrong kind in a file that is otherwise whole
        content = json.dumps(
            json.loads((folder / name).read_text()) | {"hidden_size": "big"}
        ).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(ModelUnavailable, match=str(folder)):
        run_doctor(PairOptions(str(folder), str(folder)), "auto")


@pytest.mark.parametrize("name", ["a" * 5000, "~no-such-user/x", "a\0b"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ModelUnavailable):
        Checkpoint.open(name)
