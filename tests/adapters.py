"""LoRA adapters written as PEFT writes them, and the weights that they make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MODULES = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
PREFIX = "base_model.model."


def shapes_of(model: Path) -> dict[str, list[int]]:
    """The linear layers of a model that an adapter changes, and the shapes of their weights."""
    with safe_open(model / "model.safetensors", framework="pt") as opened:
        return {
            name.removesuffix(".weight"): opened.get_slice(name).get_shape()
            for name in opened.keys()  # noqa: SIM118  # it is no mapping
            if name.split(".")[-2] in MODULES
        }


def write_adapter(
    folder: Path, model: Path, *, rank: int = 4, seed: int = 0, **changes: Any
) -> Path:
    """Writes an adapter of random numbers, large enough to change most tokens."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(MODULES),
        "bias": "none",
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module, (outputs, inputs) in shapes_of(model).items():
        a = torch.randn(rank, inputs, generator=random) * 0.1
        b = torch.randn(outputs, rank, generator=random) * 0.02
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def merge(folder: Path, model: Path, adapter: Path) -> Path:
    """Writes the model whose weights are those of `model` and `adapter` together, in float32."""
    shutil.copytree(model, folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    weights = {n: w.float() for n, w in load_file(model / "model.safetensors").items()}
    pairs = load_file(adapter / "adapter_model.safetensors")
    for module in shapes_of(model):
        a, b = (pairs[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        weights[f"{module}.weight"] += scale * b @ a
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
