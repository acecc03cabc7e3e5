"""Models that come with Python code: it is never run unless asked for, and nobody is asked on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from midlogit import ModelUnavailable, Pair
from midlogit.models.checkpoint import Checkpoint
from tests.variants import copy_pair, edit

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair whose configuration, model and tokenizer are in a file of code, which leaves a mark where it is run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = copy_pair(tmp_path / "pair")
    for side in ("base", "teacher"):
        (folder / side / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
        edit(
            folder / side / "config.json",
            lambda data: data.update(
                model_type="own",
                architectures=["OwnForCausalLM"],
                auto_map={
                    "AutoConfig": "own.OwnConfig",
                    "AutoModelForCausalLM": "own.OwnForCausalLM",
                },
            ),
        )
        edit(
            folder / side / "tokenizer_config.json",
            lambda data: data.update(
                tokenizer_class="OwnTokenizer",
                auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
            ),
        )
    return folder


def on_terminal(arguments: list[str]) -> tuple[int, str]:
    """Runs midlogit with a terminal as standard input and output, on which "y" was typed ahead."""
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\ny\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "midlogit", *arguments], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        said += part
    os.close(ours)
    return process.wait(), said.decode()


def test_code_is_not_run_and_nobody_is_asked(with_code: Path, tmp_path: Path) -> None:
    code, said = on_terminal(
        ["doctor", "--base", str(with_code / "base"), "--teacher", str(with_code / "teacher")]
    )
    assert code == 1 and "[y/N]" not in said and "--trust-remote-code" in said
    for side in ("base", "teacher"):
        with pytest.raises(ModelUnavailable, match="Python code that comes with it"):
            Checkpoint.open(with_code / side)
    assert not (tmp_path / "mark").exists()


def test_the_tokenizer_alone_may_need_code(with_code: Path, tmp_path: Path) -> None:
    folder = with_code / "base"

    def as_before(data) -> None:
        data.update(model_type="llama", architectures=["LlamaForCausalLM"])
        data.pop("auto_map")

    edit(folder / "config.json", as_before)
    with pytest.raises(ModelUnavailable, match="Python code that comes with it"):
        Checkpoint.open(folder)
    assert not (tmp_path / "mark").exists()


def test_code_that_is_trusted_is_run(with_code: Path, tmp_path: Path) -> None:
    with Pair.local(
        with_code / "base", with_code / "teacher", device="cpu", trust_remote_code=True
    ) as pair:
        assert type(pair.engine.base.model).__name__ == "OwnForCausalLM"
        assert pair.generate(["Once"])[0].finish_reason in ("stop", "length")
    assert (tmp_path / "mark").read_text() == "run"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attn_implementation": "someone/kernel"}, "names code to run: 'someone/kernel'"),
        ({"_attn_implementation": "someone/kernel@main:f"}, "names code to run"),
        ({"transformers_weights": "../other/model.safetensors"}, "names other weights"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000. At most"),
        ({"num_hidden_layers": 50_000}, "has 50000 layers, its files 38 tensors"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"vocab_size": 10**12}, "config.json asks for"),
        ({"max_position_embeddings": -1}, "a context of -1 tokens"),
    ],
)
def test_a_configuration_that_asks_for_more_than_a_model(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    folder = copy_pair(tmp_path / "pair")
    edit(folder / "base" / "config.json", lambda data: data.update(changes))
    with pytest.raises(ModelUnavailable, match=r"config\.json") as caught:
        Pair.local(folder / "base", folder / "teacher", device="cpu")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_stays_in_its_folder_and_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = copy_pair(tmp_path / "pair")
    weights = folder / "base" / "model.safetensors"
    weights.rename(folder / "base" / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"pytorch_model\.bin is not read"):
        Pair.local(folder / "base", folder / "teacher", device="cpu")
    index = {"weight_map": {"model.norm.weight": "../teacher/model.safetensors"}}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelUnavailable, match="names a file that is not beside it"):
        Pair.local(folder / "base", folder / "teacher", device="cpu")
