"""Names of vLLM's internals that this folder uses, checked when a core opens; uses none itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midlogit.errors import UnsupportedVersion


def require_core(core: Any) -> None:
    """Checks by name what is used of an EngineCore and of what it has.

    Raises:
        UnsupportedVersion: something is missing.
    """
    _require({
        "EngineCore": (
            core, "add_request", "abort_requests", "request_block_hasher", "shutdown", "vllm_config",
        ),
        "Scheduler": (
            core.scheduler, "schedule", "update_from_output", "requests", "running", "waiting",
            "set_pause_state", "reset_prefix_cache", "kv_cache_config",
        ),
        "KVCacheManager": (
            core.scheduler.kv_cache_manager, "allocate_slots", "cache_blocks", "coordinator",
            "empty_kv_cache_blocks",
        ),
        "Executor": (core.model_executor, "execute_model", "collective_rpc"),
        "Worker": (
            core.model_executor.driver_worker.worker, "reload_weights", "_weight_update_active",
        ),
    })  # fmt: skip
    coordinator = core.scheduler.kv_cache_manager.coordinator
    _require({"KVCacheCoordinator": (coordinator, "single_type_managers")})
    for manager in coordinator.single_type_managers:
        _require({"SingleTypeKVCacheManager": (manager, "block_size", "num_cached_block")})
    if core.async_scheduling or core.batch_queue is not None:
        raise _lacks("synchronous scheduling")


def require_runner_v1(runner: Any) -> None:
    """Checks by name what is used of model runner V1.

    Raises:
        UnsupportedVersion: something is missing.
    """
    _require({
        "GPUModelRunner": (
            runner, "execute_model_state", "input_batch", "discard_request_mask", "model_config",
            "_prepare_input_ids", "input_ids", "requests", "cudagraph_dispatcher",
            "uniform_decode_query_len", "prepare_inputs_event", "num_computed_tokens", "seq_lens",
            "positions", "req_indices", "query_start_loc", "use_async_spec_decode", "get_model",
            "_update_states_after_model_execute",
        ),
    })  # fmt: skip


def require_runner_v2(runner: Any) -> None:
    """Checks by name what is used of model runner V2.

    Raises:
        UnsupportedVersion: something is missing.
    """
    _require({
        "GPUModelRunner": (
            runner, "execute_model_state", "req_states", "postprocess_sampled", "get_model",
        ),
        "RequestState": (
            runner.req_states, "req_id_to_index", "draft_tokens", "last_sampled_tokens",
            "num_computed_tokens", "total_len",
        ),
    })  # fmt: skip


def _require(used: Mapping[str, tuple[Any, ...]]) -> None:
    missing = [
        f"{owner}.{name}"
        for owner, (thing, *names) in used.items()
        for name in names
        if not hasattr(thing, name)
    ]
    if missing:
        raise _lacks(", ".join(missing))


def _lacks(what: str) -> UnsupportedVersion:
    return UnsupportedVersion(f"This vLLM lacks {what}.", "Run: pip install 'vllm==0.32.*'")
