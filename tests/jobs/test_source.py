"""A job over HTTP drafts as many tokens as its manifest says, however its pair is opened."""

from __future__ import annotations

from typing import Any

import pytest

from midlogit import Pair
from midlogit.jobs import PairSource
from midlogit.models.checkpoint import open_checkpoints
from midlogit.models.mixing import Mixing


@pytest.mark.parametrize(
    ("options", "drafts"),
    [({}, 4), ({"speculation": "off"}, "off"), ({"speculation": 2}, 2), ({"top_k": "auto"}, "off")],
)
def test_drafts_of_a_job_are_fixed(
    options: dict[str, Any], drafts: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(Pair, "http", lambda base, teacher, **keywords: given.update(keywords))
    source = PairSource("http", "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1", options)

    source.open()
    assert given == {**options, "speculation": drafts}
    assert source.facts(Mixing(*open_checkpoints(None, None)))["speculation"] == drafts

    given.clear()
    source.open(seeded=False)
    assert given == options
