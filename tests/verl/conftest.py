"""verl in an environment of its own, and two vLLM servers (see Makefile)."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest

from tests.http.conftest import proxies, urls

__all__ = ["proxies", "urls"]

if find_spec("verl") is None:
    collect_ignore = ["test_agent_loop.py", "test_refusals.py", "test_weight_updates.py"]
else:
    with warnings.catch_warnings():  # of verl and of what it imports
        warnings.simplefilter("ignore")
        import verl.trainer.ppo.v1  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "verl":
            item.add_marker(pytest.mark.filterwarnings("ignore"))
