"""What tests set in the environment before vLLM is imported; knows no test."""

from __future__ import annotations

import os

SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # On a GPU vLLM's attention in float32 would round its products to TF32, 1e-3 away from the local engine.
    "TRITON_F32_DEFAULT": "ieee",
}


def prepare_environment() -> None:
    """Sets what the caller's environment does not say otherwise."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
