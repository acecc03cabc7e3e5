"""Names of vLLM's internals that this folder uses, checked when a core opens; uses none itself."""

from __future__ import annotations

from typing import Any

from midlogit.errors import UnsupportedVersion


def require_internals(core: Any, runner: Any) -> None:
    """Checks by name all internals of vLLM that are used here.

    Raises:
        UnsupportedVersion: one is missing.
    """
    used = {
        "EngineCore": (
            core, "add_request", "abort_requests", "request_block_hasher", "shutdown", "vllm_config",
        ),
        "Scheduler": (
            core.scheduler, "schedule", "update_from_output", "requests", "running", "waiting",
            "set_pause_state", "reset_prefix_cache",
        ),
        "Executor": (core.model_executor, "execute_model", "sample_tokens", "collective_rpc"),
        "Worker": (
            core.model_executor.driver_worker.worker, "reload_weights", "_weight_update_active",
        ),
        "GPUModelRunner": (
            runner, "execute_model_state", "input_batch", "discard_request_mask", "_sample",
            "_to_list", "_prepare_input_ids", "input_ids", "requests", "cudagraph_dispatcher",
            "uniform_decode_query_len", "prepare_inputs_event", "num_computed_tokens", "seq_lens",
            "positions", "req_indices", "query_start_loc", "use_async_spec_decode", "get_model",
        ),
    }  # fmt: skip
    missing = [
        f"{owner}.{name}"
        for owner, (thing, *names) in used.items()
        for name in names
        if not hasattr(thing, name)
    ]
    if missing or core.async_scheduling or core.batch_queue is not None:
        found = ", ".join(missing) or "synchronous scheduling"
        raise UnsupportedVersion(f"This vLLM lacks {found}.", "Run: pip install 'vllm==0.32.*'")
