"""The weights of both models on their devices: loaded from folders, or given as modules; knows no cache and no rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module
from transformers import AutoModelForCausalLM

from midlogit.errors import InvalidRequest, ModelUnavailable, first_line
from midlogit.models.checkpoint import Checkpoint

Modules = tuple[Module | None, Module | None]  # of base and teacher, where they are loaded already


def load_models(
    base: Checkpoint,
    teacher: Checkpoint,
    modules: Modules,
    devices: tuple[str, str],
    dtype: str,
) -> tuple[Any, Any]:
    """The models of base and teacher, ready to run; one for both where they are loaded from one checkpoint.

    Args:
        modules: taken as they are, wherever they are.
        devices, dtype: of what is loaded; "auto" is the device of the other side's module, where there is one.

    Raises:
        ModelUnavailable: weights that cannot be loaded, or an architecture that needs another kind of cache.
        InvalidRequest: an unknown device or dtype.
    """
    for checkpoint in (base, teacher):
        _require_batchable(checkpoint)
    base_module, teacher_module = modules
    base_device = _device_beside(teacher_module, devices[0])
    teacher_device = _device_beside(base_module, devices[1])

    # The larger model first: loading takes a mapping of its file beside the weights.
    teacher_model = teacher_module
    if teacher_model is None:
        teacher_model = load_model(teacher, teacher_device, parse_dtype(dtype, teacher_device))

    if base_module is not None:
        return base_module, teacher_model
    # A module keeps the name of the folder that it was loaded from, whatever its weights have become.
    if teacher_module is None and base.name == teacher.name and base_device == teacher_device:
        return teacher_model, teacher_model
    return load_model(base, base_device, parse_dtype(dtype, base_device)), teacher_model


def _require_batchable(checkpoint: Checkpoint) -> None:
    if checkpoint.unsupported_layers:
        kinds = ", ".join(sorted(checkpoint.unsupported_layers))
        raise ModelUnavailable(
            f"{checkpoint.name} has layers of a kind the local engine cannot batch: {kinds}."
        )


def _device_beside(other: Module | None, name: str) -> torch.device:
    if other is not None and name == "auto":
        return next(other.parameters()).device
    return parse_device(name)


def parse_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA where there is one.

    Raises:
        InvalidRequest: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequest(
            f"Device {name!r} cannot be used: {first_line(error)}.", "Use cpu, cuda or cuda:NUMBER."
        ) from error
    return device


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """A floating dtype by name; "auto" is float32 on the CPU and bfloat16 elsewhere.

    Raises:
        InvalidRequest: an unknown dtype.
    """
    known = {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise InvalidRequest(f"Unknown dtype {name!r}.", f"Use auto, {', '.join(known)}.")
    return known[name]


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The model's weights, ready to run.

    Raises:
        ModelUnavailable: the weights cannot be loaded.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=checkpoint.trust_remote_code,
        )
    except Exception as error:  # a damaged file, or a device that is too small, fails in many ways
        raise ModelUnavailable(
            f"The weights of {checkpoint.name} cannot be loaded: {first_line(error)}"
        ) from error
    _require_all_loaded(checkpoint, report)
    return model.to(device).eval()


def _require_all_loaded(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Checks the report of transformers, which gives random values to what no file holds.

    Raises:
        ModelUnavailable: a tensor is missing, of another shape, or of no use.
    """
    for kind, names in report.items():
        if names:
            raise ModelUnavailable(
                f"The weights of {checkpoint.name} do not fit its configuration:"
                f" {kind.replace('_', ' ')} {', '.join(map(str, sorted(names)[:3]))}."
            )
