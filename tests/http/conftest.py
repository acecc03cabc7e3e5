"""Two servers of the bundled pair for the whole session; MIDLOGIT_TEST_SERVERS=BASE,TEACHER uses running ones.

MIDLOGIT_TEST_VLLM=0.24.0 starts another version of vLLM than the one that CI tests.

The base is served with sampling defaults of its own, which vLLM takes from generation_config.json: every test
passes only because the engine sends all parameters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import pytest

from midlogit.models.checkpoint import bundled
from tests.http.proxy import Proxy
from tests.http.servers import VERSION, serving

WHOLE = 4096  # ids of the bundled pair
FLAGS = ("--enforce-eager", "--max-model-len", "512", "--max-logprobs", str(WHOLE))


@dataclass(frozen=True)
class Urls:
    base: str
    teacher: str


def with_sampling_defaults(model: Path, folder: Path) -> Path:
    """A copy of a model that samples otherwise when it is not told how."""
    copytree(model, folder)
    file = folder / "generation_config.json"
    defaults = {
        "do_sample": True,
        "temperature": 0.2,
        "top_k": 3,
        "top_p": 0.5,
        "repetition_penalty": 1.7,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    return folder


@pytest.fixture(scope="session")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    given = os.environ.get("MIDLOGIT_TEST_SERVERS")
    if given:
        yield Urls(*given.split(","))
        return
    base = with_sampling_defaults(bundled("base"), tmp_path_factory.mktemp("served") / "base")
    version = os.environ.get("MIDLOGIT_TEST_VLLM", VERSION)
    with serving(base, bundled("teacher"), flags=FLAGS, version=version) as both:
        yield Urls(*both)


@pytest.fixture
def proxies(urls: Urls) -> Iterator[tuple[Proxy, Proxy]]:
    """A proxy before each server, without faults until told."""
    with Proxy(urls.base) as base, Proxy(urls.teacher) as teacher:
        yield base, teacher
