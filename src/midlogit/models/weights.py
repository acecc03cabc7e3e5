"""Memory of a checkpoint: its weights and its KV cache, from files and configuration; loads no weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

from midlogit.errors import ModelUnavailable
from midlogit.models.checkpoint import Checkpoint


def weight_count(checkpoint: Checkpoint) -> int | None:
    """Number of weights in the folder's safetensors files, None for a hub id or other formats.

    Raises:
        ModelUnavailable: a file that is none of safetensors.
    """
    files = sorted(Path(checkpoint.name).glob("*.safetensors"))
    return sum(map(_weights_in, files)) or None


def weight_bytes(checkpoint: Checkpoint, width: int) -> int:
    """Bytes of the weights at `width` bytes each; quantised ones count by their files.

    A model without files here (a hub id, a configuration alone) is counted by its architecture.
    """
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        files = sum(file.stat().st_size for file in Path(checkpoint.name).glob("*.safetensors"))
        if files:
            return files

    return (weight_count(checkpoint) or _weights_of_architecture(checkpoint)) * width


def kv_values_per_token(checkpoint: Checkpoint) -> int:
    """Numbers that one token adds to the KV cache."""
    config = checkpoint.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim)


def _weights_of_architecture(checkpoint: Checkpoint) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config)
    return sum(weight.numel() for weight in model.parameters())


def _weights_in(file: Path) -> int:
    """Number of weights by the header of a safetensors file.

    Raises:
        ModelUnavailable: it has none.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, file.stat().st_size)))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(tensor["shape"]) for tensor in tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{file} is no safetensors file.", "Fetch it again.") from error
