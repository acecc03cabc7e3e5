"""A server whose weights change under the same name is noticed, and completions say so; updates on purpose are not."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from midlogit import Completion, Pair, SamplingParams
from midlogit.engines.http import weight_watch
from midlogit.engines.http.fingerprints import differ
from midlogit.jobs.schema import Layout, record_of
from midlogit.server.call import add_versions
from tests.http.conftest import Urls
from tests.http.proxy import Proxy
from tests.http.test_engine import PROMPTS
from tests.http.test_updates import saved, untied

PARAMS = SamplingParams(max_tokens=6, seed=11, ignore_eos=True)


def reload(urls: Urls, folder: Path) -> None:
    """Has the base's server load other weights; no pair is told."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    for path, content in (("collective_rpc", body), ("reset_prefix_cache", {})):
        request = urllib.request.Request(
            urls.base.removesuffix("v1") + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request):
            pass


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(untied(4), tmp_path_factory.mktemp("other"))


@pytest.fixture
def first(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The weights that the base was started with; it has them again in the end."""
    folder = saved(untied(0, 0.0), tmp_path_factory.mktemp("first"))
    yield folder
    reload(urls, folder)


def changed(completions: list[Completion]) -> set[tuple[str, ...]]:
    return {tuple(completion.weights_changed) for completion in completions}


def test_other_weights_under_the_same_name(
    urls: Urls,
    first: Path,
    other: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(weight_watch, "CHECK_EVERY", 0.0)
    with caplog.at_level("WARNING", logger="midlogit"), Pair.http(urls.base, urls.teacher) as pair:
        expected = pair.generate(PROMPTS[:3], PARAMS, progress=False)
        assert changed(expected) == {()} and "weights_changed" not in expected[0].to_dict()

        reload(urls, other)
        found = pair.generate(PROMPTS[:3], PARAMS, progress=False)
        assert changed(found) == {("base",)}
        assert (
            found[0].to_dict()["weights_changed"] == found[0].rollout().weights_changed == ["base"]
        )
        assert [s.weights_changed for s in pair.score(PROMPTS[:2])] == [["base"]] * 2
        layout = Layout("none", 0, pa.schema([]))
        assert record_of(found[0], 1, layout)["weights_changed"] == "base"
        assert record_of(expected[0], 1, layout)["weights_changed"] is None
        choice: dict[str, object] = {}
        add_versions(choice, found[0])
        assert choice == {"weights_changed": ["base"]}
        assert caplog.text.count("serves other weights") == 1 and f"base {urls.base}" in caplog.text

        pair.update_base()  # whoever gave the server new weights says so
        assert changed(pair.generate(PROMPTS[:3], PARAMS, progress=False)) == {()}
        pair.update_base(first)
        again = pair.generate(PROMPTS[:3], PARAMS, progress=False)
        assert changed(again) == {()}
        assert [c.token_ids for c in again] == [c.token_ids for c in expected]


def test_every_token_after_a_lost_connection_comes_from_checked_weights(
    urls: Urls, first: Path, other: Path, proxies: tuple[Proxy, Proxy]
) -> None:
    """As after a restart: the server is not there for a moment, and then has other weights."""
    base, teacher = proxies
    with Pair.http(base.url, teacher.url, max_retries=8) as pair:
        stream = pair.stream(PROMPTS[5], SamplingParams(max_tokens=200, seed=1, ignore_eos=True))
        for _ in range(3):
            next(stream)
        lost = threading.Event()
        base.fault = lambda call: lost.set() or "reset"  # type: ignore[func-returns-value]
        assert lost.wait(60)
        reload(urls, other)
        base.fault = lambda call: ""
        *_, completion = stream
        assert isinstance(completion, Completion)
        assert completion.weights_changed == ["base"] and completion.error is None
        assert changed(pair.generate(PROMPTS[:2], PARAMS, progress=False)) == {("base",)}


def test_weights_computed_again_are_the_same() -> None:
    """Values as far apart as bfloat16 rounds them do not count; another model's do."""
    row = {i: -2.0 - i / 8 for i in range(20)}
    rounded = {i: value + (0.0625 if i % 2 else -0.0625) for i, value in row.items()}
    shifted = {i + 3: value for i, value in row.items()}
    assert not differ([row, row], [rounded, row])
    assert differ([row, row], [shifted, shifted])
