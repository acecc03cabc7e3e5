"""The weights of a checkpoint: the tensors that its files hold and its architecture has, and the memory they take.

Knows safetensors headers and configuration; reads no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midlogit.errors import InvalidRequest, ModelUnavailable, first_line
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.files import naming

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = [SINGLE, "model-*", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]  # of a model
AGAIN = "Fetch it again."


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its dtype as safetensors names it, such as BF16, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def weights_folder(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint's weights are; those of a hub id are fetched first.

    Raises:
        ModelUnavailable: the hub does not give them.
    """
    if Path(checkpoint.name).is_dir():
        return Path(checkpoint.name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(checkpoint.name, allow_patterns=[SINGLE, "model-*", INDEX]))
    except Exception as error:  # the hub fails in many ways
        raise ModelUnavailable(
            f"The weights of {checkpoint.name} cannot be fetched: {first_line(error)}"
        ) from error


def at_revision(name: str | Path | None, revision: str | None) -> str | Path | None:
    """The folder of a hub id's files at a revision, which are fetched; without a revision, the name.

    Raises:
        InvalidRequest: a revision of a folder, or of the bundled pair.
        ModelUnavailable: the hub does not give them.
    """
    if revision is None:
        return name
    if name is None or Path(name).exists():
        raise InvalidRequest(
            f"revision is {revision!r}, and {name or 'the bundled pair'} is no hub id.",
            "Leave it out: a folder has no revisions.",
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(str(name), revision=revision, allow_patterns=FILES)
    except Exception as error:  # the hub fails in many ways
        raise ModelUnavailable(
            f"{name} cannot be fetched at the revision {revision!r}: {first_line(error)}"
        ) from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by name; none where it holds no safetensors files that transformers would load.

    Raises:
        ModelUnavailable: a file that is damaged or not there, or an index that does not fit its files.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        return dict(tensors_in(single)) if single.is_file() else {}
    if single.is_file():
        raise ModelUnavailable(f"{folder} holds both {SINGLE} and {INDEX}.", "Remove one of them.")

    names = _indexed(index)
    found: dict[str, Stored] = {}
    for file in sorted(set(names.values())):
        for name, tensor in tensors_in(folder / file):
            if names.get(name) != file:
                raise ModelUnavailable(
                    f"{tensor.file} holds {name}, {INDEX} says otherwise.", AGAIN
                )
            found[name] = tensor
    if missing := names.keys() - found.keys():
        name = min(missing)
        raise ModelUnavailable(f"{folder / names[name]} lacks {name}, which {INDEX} names.", AGAIN)
    return found


def weight_count(checkpoint: Checkpoint) -> int | None:
    """Number of weights in the folder's safetensors files, None for a hub id or other formats.

    Raises:
        ModelUnavailable: as `stored_tensors`.
    """
    return sum(tensor.size for tensor in stored_tensors(Path(checkpoint.name)).values()) or None


def weight_bytes(checkpoint: Checkpoint, width: int) -> int:
    """Bytes of the weights at `width` bytes each; quantised ones count by their files.

    A model without files here (a hub id, a configuration alone) is counted by its architecture.
    """
    tensors = stored_tensors(Path(checkpoint.name)).values()
    if tensors and getattr(checkpoint.config, "quantization_config", None) is not None:
        return sum(file.stat().st_size for file in {tensor.file for tensor in tensors})

    count = sum(tensor.size for tensor in tensors)
    return (count or sum(w.numel() for w in architecture(checkpoint).parameters())) * width


def key_value_heads(checkpoint: Checkpoint) -> int:
    """Heads of attention that the KV cache holds, in each layer."""
    config = checkpoint.config
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def kv_values_per_token(checkpoint: Checkpoint) -> int:
    """Numbers that one token adds to the KV cache."""
    config, heads = checkpoint.config, key_value_heads(checkpoint)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim)


def architecture(checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint's configuration, without memory for weights.

    Raises:
        ModelUnavailable: a configuration that makes none.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with naming("config.json", checkpoint.name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            checkpoint.config, trust_remote_code=checkpoint.trust_remote_code
        )
    model.tie_weights()
    return model


def _indexed(index: Path) -> dict[str, str]:
    """The names of tensors and the files that hold them, by an index.

    Raises:
        ModelUnavailable: it is damaged, or names a file outside of its folder.
    """
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        plain = all(isinstance(file, str) and Path(file).name == file for file in names.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelUnavailable(f"{index} is no index of weights.", AGAIN) from error
    if not plain or not names:
        raise ModelUnavailable(f"{index} names a file that is not beside it.", AGAIN)
    return dict(names)


def tensors_in(file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a safetensors file, by its header.

    Raises:
        ModelUnavailable: it has none, or another length than the header says.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ModelUnavailable(f"There is no {file}.", AGAIN)
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                tensor = opened.get_slice(name)
                yield name, Stored(file, tensor.get_dtype(), tuple(tensor.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelUnavailable(
            f"{file} is no safetensors file: {first_line(error)}.", AGAIN
        ) from error
