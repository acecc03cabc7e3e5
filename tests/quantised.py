"""Small quantised checkpoints in the formats of their makers, and plain ones of the same values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32  # inputs that share a scale
BITS = 4
ZERO = 8  # what stands for 0 among 4 bits
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Layer = tuple[dict[str, Tensor], Tensor]  # the tensors of a layer by their endings, and its values


def gptq(weight_OI: Tensor) -> Layer:
    quantised_IO, scales_GO, values_OI = _rounded(weight_OI)
    outputs, inputs = weight_OI.shape
    stored = {
        "qweight": _packed(quantised_IO.view(-1, 8, outputs).transpose(1, 2)),
        "scales": scales_GO,
        # The format stores zeros less one.
        "qzeros": _packed(torch.full((inputs // GROUP, outputs // 8, 8), ZERO - 1)),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }
    return stored, values_OI


def awq(weight_OI: Tensor) -> Layer:
    quantised_IO, scales_GO, values_OI = _rounded(weight_OI)
    outputs, inputs = weight_OI.shape
    stored = {
        "qweight": _packed(quantised_IO.view(inputs, -1, 8)[..., AWQ_ORDER]),
        "scales": scales_GO,
        "qzeros": _packed(torch.full((inputs // GROUP, outputs // 8, 8), ZERO)),
    }
    return stored, values_OI


def fp8(weight_OI: Tensor) -> Layer:
    scale = (weight_OI.abs().max() / torch.finfo(torch.float8_e4m3fn).max).float()
    weight = (weight_OI / scale).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale


FORMATS: dict[str, tuple[Callable[[Tensor], Layer], dict[str, Any]]] = {
    "gptq": (gptq, {"bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"bits": BITS, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "fp8": (fp8, {"activation_scheme": "dynamic"}),
}


def quantise(folder: Path, model: Path, method: str) -> tuple[Path, Path]:
    """Writes a model with its linear layers quantised, and a float32 one of the values that they stand for."""
    make, config = FORMATS[method]
    quantised = shutil.copytree(model, folder / "quantised")
    plain = shutil.copytree(model, folder / "plain")
    packed: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        values[name] = weight.float()
        packed[name] = weight.half() if method != "fp8" else weight.bfloat16()
        if name.endswith("_proj.weight"):
            stored, values[name] = make(weight.float())
            del packed[name]
            packed |= {name.removesuffix("weight") + ending: t for ending, t in stored.items()}

    save_file({n: t.contiguous() for n, t in packed.items()}, quantised / "model.safetensors")
    save_file({n: t.contiguous() for n, t in values.items()}, plain / "model.safetensors")
    described = json.loads((quantised / "config.json").read_text())
    described["quantization_config"] = {"quant_method": method, **config}
    (quantised / "config.json").write_text(json.dumps(described))
    return quantised, plain


def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits of each weight, inputs first; their scales by group; the values that both stand for."""
    outputs, inputs = weight_OI.shape
    groups_OGI = weight_OI.view(outputs, -1, GROUP)
    scales_OG = (groups_OGI.abs().amax(dim=2) / (ZERO - 1)).clamp(min=1e-4).half()
    steps_OGI = (groups_OGI / scales_OG[..., None].float()).round().clamp(-ZERO, ZERO - 1)
    values_OI = (steps_OGI * scales_OG[..., None].float()).view(outputs, inputs)
    quantised_IO = (steps_OGI + ZERO).int().view(outputs, inputs).T.contiguous()
    return quantised_IO, scales_OG.T.contiguous(), values_OI


def _packed(nibbles: Tensor) -> Tensor:
    """Eight numbers of 4 bits in the last dimension as one of 32."""
    shifted = nibbles.long() << (BITS * torch.arange(8))
    total = shifted.sum(dim=-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
