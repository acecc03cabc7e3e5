"""Weights that fit their configuration, of architectures that name and arrange them in their own ways."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from midlogit import ModelUnavailable
from midlogit.engines.local.loading import load_model
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.fit import require_fit
from tests.conftest import BASE
from tests.damage import read_header, write_header
from tests.variants import edit

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": SIZES,
    "gpt2": {"vocab_size": 4096, "n_embd": 64, "n_layer": 2, "n_head": 4, "eos_token_id": 0},
    "mixtral": {**SIZES, "num_local_experts": 4},
    "gemma3": {"text_config": SIZES, "vision_config": VISION, "mm_tokens_per_image": 4},
}


def saved(folder: Path, kind: str, **options: Any) -> Path:
    """A model of random weights with the bundled tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    model.save_pretrained(folder, **options)
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder / name)
    return folder


def load(folder: Path) -> Any:
    checkpoint = Checkpoint.open(folder)
    require_fit(checkpoint)
    return load_model(checkpoint, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}])
@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_is_loaded(tmp_path: Path, kind: str, options: dict[str, str]) -> None:
    loaded = load(saved(tmp_path, kind, **options))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    LlamaModel.from_pretrained(BASE).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda data: data.update(architectures=["LlamaForCausalLM"]))
    load(with_tokenizer(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_less_or_of_another_name_is_refused(tmp_path: Path, kind: str) -> None:
    file = saved(tmp_path, kind) / "model.safetensors"
    header, data = read_header(file)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    renamed = {name if name != last else "other": entry for name, entry in header.items()}
    write_header(file, renamed, data)
    with pytest.raises(ModelUnavailable) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)

    begin, _ = header.pop(last)["data_offsets"]
    write_header(file, header, data[:begin])
    with pytest.raises(ModelUnavailable, match="lack"):
        load(tmp_path)


def test_a_hub_id_is_checked_where_it_was_fetched_to(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads the place of its cache once."""
    model = tmp_path / "models--some--base"
    snapshot = model / "snapshots" / ("0" * 40)
    shutil.copytree(BASE, snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    code = (
        "from midlogit.models.checkpoint import Checkpoint; from midlogit.models.fit import require_fit\n"
        "from midlogit import ModelUnavailable; checkpoint = Checkpoint.open('some/base')\n"
        "require_fit(checkpoint); print('fits')\n"
        f"import os; os.truncate({str(snapshot / 'model.safetensors')!r}, 1000)\n"
        "try: require_fit(checkpoint)\n"
        "except ModelUnavailable as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("fits\n") and "model.safetensors is no safetensors file" in said
