"""The CPU as a platform of verl, which knows GPUs and NPUs alone; to be loaded before anything asks for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

MEMORY = 8 * 2**30  # bytes, of which verl's logs speak


def nothing(*_: Any, **__: Any) -> None:
    """What a CPU need not do."""


def zero(*_: Any, **__: Any) -> int:
    return 0


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """What verl asks of a device; Ray counts it as a GPU."""

    device_name = "cpu"
    vendor_name = "none"
    device_module = SimpleNamespace(
        empty_cache=nothing,
        is_available=lambda: True,
        synchronize=nothing,
        set_device=nothing,
        device_count=lambda: 1,
        get_device_name=lambda: "cpu",
        mem_get_info=lambda *_: (MEMORY, MEMORY),
        memory_allocated=zero,
        memory_reserved=zero,
        max_memory_allocated=zero,
        max_memory_reserved=zero,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        set_per_process_memory_fraction=nothing,
    )
    set_device = synchronize = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = nothing

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False
