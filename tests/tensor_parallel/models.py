"""The bundled base in a form that two ranks can share: three heads of attention and one that says nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import BASE
from tests.updates import Named

HEAD = 64


def widened(weights: Named) -> Named:
    """The weights of the bundled base with a fourth head of zeros, which adds nothing to any token."""
    wide = {}
    for name, weight in weights.items():
        if ".self_attn." in name:
            axis = 1 if ".o_proj." in name else 0
            shape = [HEAD if axis == n else size for n, size in enumerate(weight.shape)]
            weight = torch.cat([weight, weight.new_zeros(shape)], axis)
        wide[name] = weight.contiguous()
    return wide


def write_widened(folder: Path) -> Path:
    """A folder of the widened base."""
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    weights = widened(load_file(BASE / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
