"""The decision of a step in a fixed number of kernel launches; knows CUDA devices and Triton, no engine.

decide/arrays.py stays the reference, and the fallback where Triton or a CUDA device is missing.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["available"]


def available(device: torch.device) -> bool:
    """Whether `midlogit.decide.kernels.decider.KernelDecider` runs on this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
