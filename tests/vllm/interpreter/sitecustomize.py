"""Runs the kernels of vLLM's model runner V2 on a CPU, in Triton's interpreter, where this folder is on the path.

vLLM asks for a backend of Triton named "cpu" before it uses Triton there. The interpreter compiles nothing, and says so
to torch.compile, which asks each backend.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
from triton.backends import backends
from triton.backends.compiler import GPUTarget

os.environ["TRITON_INTERPRET"] = "1"


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu


compiler = SimpleNamespace(supports_target=lambda target: False)
backends["cpu"] = SimpleNamespace(driver=Driver, compiler=compiler)
