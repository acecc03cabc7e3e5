"""Slots of the KV cache for a request's next tokens: knows blocks and how full the last one is, no model."""

from __future__ import annotations

from typing import Any


def skip_full_search(scheduler: Any) -> None:
    """Has a scheduler ask for slots only where a request's next tokens fill a block or begin one.

    In between, the last block has room, and vLLM would look through all that a request may need to find that out:
    more than half of the time in which it schedules a batch that decodes.
    """
    manager = scheduler.kv_cache_manager
    groups = scheduler.kv_cache_config.kv_cache_groups
    block_size = min(group.kv_cache_spec.block_size for group in groups)
    search = manager.allocate_slots

    def allocate_slots(request: Any, num_new_tokens: int, *args: Any, **options: Any) -> Any:
        filled = request.num_computed_tokens % block_size
        further = options.get("num_lookahead_tokens", 0)
        decodes = not args and options.keys() <= {"num_lookahead_tokens"}  # as for a running one
        if filled and decodes and filled + num_new_tokens + further < block_size:
            return manager.empty_kv_cache_blocks
        return search(request, num_new_tokens, *args, **options)

    manager.allocate_slots = allocate_slots
