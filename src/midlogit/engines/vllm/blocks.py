"""Blocks of the KV cache that a request's next tokens begin or fill: knows how full the last one is, no model.

vLLM looks for both after every token of every request. In between, nothing changes.
"""

from __future__ import annotations

from typing import Any


def skip_idle_searches(scheduler: Any) -> None:
    """Has a scheduler look at a request's blocks only where its tokens begin or fill one."""
    _skip_allocation(scheduler)
    _skip_caching(scheduler.kv_cache_manager)


def _skip_allocation(scheduler: Any) -> None:
    """Asks for slots only where the last block has no room: more than half of the time of a step's schedule."""
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


def _skip_caching(manager: Any) -> None:
    """Hashes blocks for the prefix cache only where one more is full: a fifth of the time of a step's update."""
    managers = manager.coordinator.single_type_managers
    if len(managers) != 1:
        return  # several kinds of attention, each with blocks of its own
    (blocks,) = managers
    cache = manager.cache_blocks

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        num_full = num_computed_tokens // blocks.block_size
        if num_full > blocks.num_cached_block.get(request.request_id, 0):
            cache(request, num_computed_tokens)

    manager.cache_blocks = cache_blocks
