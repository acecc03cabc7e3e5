"""Two servers of the bundled pair for the whole session; MIDLOGIT_TEST_SERVERS=BASE,TEACHER uses running ones.

MIDLOGIT_TEST_VLLM=0.24.0 starts another version of vLLM than the one that CI tests.

The base is served with sampling defaults of its own, which vLLM takes from generation_config.json: every test
passes only because the engine sends all parameters. It is untied, and its server takes new weights, from folders and
by transfer: on the CPU vLLM's own reloading leaves the packed head of a tied model as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import pytest
from safetensors.torch import load_file, save_file

from midlogit.models.checkpoint import bundled
from tests.http.proxy import Proxy
from tests.http.servers import VERSION, serving

WHOLE = 4096  # ids of the bundled pair
FLAGS = ("--enforce-eager", "--max-model-len", "512", "--max-logprobs", str(WHOLE))


@dataclass(frozen=True)
class Urls:
    base: str
    teacher: str


def untied(model: Path, folder: Path) -> Path:
    """A copy of a model whose head is a tensor of its own."""
    copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def with_sampling_defaults(folder: Path) -> Path:
    """A model that samples otherwise when it is not told how."""
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
    base = untied(bundled("base"), tmp_path_factory.mktemp("served") / "base")
    with_sampling_defaults(base)
    version = os.environ.get("MIDLOGIT_TEST_VLLM", VERSION)
    with serving(base, bundled("teacher"), flags=FLAGS, version=version, controlled=base) as both:
        yield Urls(*both)


@pytest.fixture
def proxies(urls: Urls) -> Iterator[tuple[Proxy, Proxy]]:
    """A proxy before each server, without faults until told."""
    with Proxy(urls.base) as base, Proxy(urls.teacher) as teacher:
        yield base, teacher
