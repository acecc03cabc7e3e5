"""One model with its cache: how the cache reaches the model's forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from midlogit.engines.local.model import cache_keyword


def before_5_24(input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


def since_5_24(input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("forward", "name"), [(before_5_24, "past_key_values"), (since_5_24, "cache")]
)
def test_cache_is_named_as_the_forward_names_it(forward: Any, name: str) -> None:
    """The whole suite, whose warnings are errors, holds the pinned release to it; `make check` the newest."""
    assert cache_keyword(SimpleNamespace(forward=forward)) == name
