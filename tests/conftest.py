"""The bundled pair, opened once for the whole run, and what plain transformers says of it."""

from __future__ import annotations

import os
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

# transformers and torch warn of things that are theirs to mend; import them before warnings become errors.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

from midlogit import Pair
from midlogit.models.checkpoint import bundled

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A run started in the background ignores SIGINT, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(2)
transformers.utils.logging.disable_progress_bar()

BASE, TEACHER = bundled("base"), bundled("teacher")


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    with Pair.local(dtype="float32", device="cpu", speculation="off") as opened:
        yield opened


@pytest.fixture(scope="session")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The bundled base and teacher as plain transformers models."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return tuple(load(folder, dtype=torch.float32).eval() for folder in (BASE, TEACHER))  # type: ignore[return-value]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs hardware or models that are not here, and says how to run it."""
    reasons = {}
    if not (folder := os.environ.get("MIDLOGIT_MODELS")) or not Path(folder).is_dir():
        reasons["real_models"] = (
            "set MIDLOGIT_MODELS to a folder with qwen-0.5b, qwen-1.5b and smollm2-135m to run it"
        )
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with 200 KB of room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)
