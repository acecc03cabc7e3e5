"""A model whose matrices are in FP8, as vLLM computes it on a GPU, on any device; knows layers, no tokens.

Weights are rounded to float8_e4m3fn with a scale per matrix, and the inputs of its matrices with a scale per token; the
head and the embeddings stay as they are. Products are summed in float32, in another order than a GPU's.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

FP8 = torch.float8_e4m3fn


def quantise(values: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Values in FP8 and the scale that `amax` gives, float32."""
    scale = amax.float().clamp(min=1e-12) / torch.finfo(FP8).max
    return (values.float() / scale).to(FP8), scale


class Fp8Linear(nn.Module):
    """A linear layer in FP8, whose results have the type of its inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = quantise(linear.weight.data, linear.weight.data.abs().amax())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        inputs, scale = quantise(x, x.abs().amax(-1, keepdim=True))
        y = functional.linear(inputs.float(), self.weight.float()) * (scale * self.scale)
        return y.to(x.dtype) if self.bias is None else y.to(x.dtype) + self.bias


def fp8_copy(model: nn.Module) -> nn.Module:
    """A copy of a transformers model with FP8 matrices and inputs."""
    head = model.get_output_embeddings()
    layers = {
        module: Fp8Linear(module)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    # What is known already is not copied, but taken as its own copy.
    return copy.deepcopy(model, {id(module): layer for module, layer in layers.items()})
