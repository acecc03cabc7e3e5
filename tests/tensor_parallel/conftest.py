"""A pair of two ranks on the CPU; these tests run in an environment that has vLLM (see Makefile)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from midlogit import Pair
from tests.conftest import TEACHER
from tests.tensor_parallel.models import write_widened
from tests.vllm_environment import prepare_environment

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

prepare_environment()

BLOCK = 32  # tokens of a KV cache block
HALF_BASE_TOKEN = 2 * 4 * 2 * 64 * 4  # bytes of cache per token and rank, float32
HALF_TEACHER_TOKEN = 2 * 8 * 1 * 64 * 4
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": BLOCK,
    "max_model_len": 256,
    "tensor_parallel_size": 2,
}


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_widened(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def shared(wide_base: Path) -> Iterator[Pair]:
    """Two ranks whose caches are too small for the sequences that run, and whose prompts are computed in chunks."""
    caches = (16 * BLOCK * HALF_BASE_TOKEN, 12 * BLOCK * HALF_TEACHER_TOKEN)
    crowded = {
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": caches,
    }
    with Pair.vllm(wide_base, TEACHER, **OPTIONS, **crowded) as opened:
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "tensor_parallel":
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's own, many of them
