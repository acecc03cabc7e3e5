"""The bundled pair on vLLM inside the test process; these tests run in an environment that has vLLM (see Makefile)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from midlogit import Pair
from midlogit.engines.vllm.engine import VllmEngine
from tests.vllm_environment import prepare_environment

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

prepare_environment()

CONTEXT = 256
BLOCK = 32  # tokens of a KV cache block
BASE_TOKEN, TEACHER_TOKEN = (
    2 * 4 * 3 * 64 * 4,
    2 * 8 * 2 * 64 * 4,
)  # bytes of cache per token, float32


def open_pair(**changes: Any) -> Pair:
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": CONTEXT,
    }
    return Pair.vllm(**{**options, **changes})


def engine_of(pair: Pair) -> VllmEngine:
    engine = pair.engine
    assert isinstance(engine, VllmEngine)
    return engine


def schedulers_of(pair: Pair) -> list[Any]:
    """vLLM's own schedulers of base and teacher: nothing public tells of preemptions and of reused blocks."""
    return [core._scheduler for core in engine_of(pair).cores]


def require_empty(pair: Pair) -> None:
    """Neither scheduler holds a request, and no block is held."""
    for core in engine_of(pair).cores:
        assert core.is_empty
        assert core.free_blocks == core.blocks


def open_crowded(**changes: Any) -> Pair:
    """A pair whose requests get into each other's way.

    Long prompts are computed in chunks among the tokens of the others, and the caches, of different sizes on the two
    sides, are too small for the sequences that run: they are preempted.
    """
    caches = (16 * BLOCK * BASE_TOKEN, 12 * BLOCK * TEACHER_TOKEN)
    return open_pair(
        max_num_seqs=32, max_num_batched_tokens=64, kv_cache_memory_bytes=caches, **changes
    )


@pytest.fixture(scope="module")
def crowded() -> Iterator[Pair]:
    """A process holds one pair, so one serves all tests of a module."""
    with open_crowded() as opened:
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "vllm":
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's own, many of them
