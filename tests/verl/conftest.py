"""verl in an environment of its own (see Makefile), and two vLLM servers, set as verl sets its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from midlogit.models.checkpoint import bundled
from tests.http.conftest import FLAGS, Urls, proxies, untied, with_sampling_defaults
from tests.http.servers import serving

__all__ = ["proxies"]

if find_spec("verl") is None:
    collect_ignore = [
        "test_agent_loop.py",
        "test_example.py",
        "test_refusals.py",
        "test_trainer.py",
        "test_weight_updates.py",
    ]
else:
    with warnings.catch_warnings():  # of verl and of what it imports
        warnings.simplefilter("ignore")
        import verl.trainer.ppo.v1  # noqa: F401


@pytest.fixture(scope="session")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    given = os.environ.get("MIDLOGIT_TEST_SERVERS")
    if given:
        yield Urls(*given.split(","))
        return
    base = untied(bundled("base"), tmp_path_factory.mktemp("served") / "base")
    with_sampling_defaults(base)
    flags = (*FLAGS, "--logprobs-mode", "processed_logprobs")
    with serving(base, bundled("teacher"), flags=flags, controlled=base) as both:
        yield Urls(*both)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "verl":
            item.add_marker(pytest.mark.filterwarnings("ignore"))
