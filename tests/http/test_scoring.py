"""Scores of given text over two real servers: those of the local engine where all ids are listed, and of generation."""

from __future__ import annotations

import threading
import time

import pytest

from midlogit import Pair, SamplingParams, Scores
from midlogit.engines.http.scoring import ROWS
from tests.http.conftest import WHOLE, Urls
from tests.http.proxy import Proxy
from tests.server.conftest import run_server

TEXTS = ["Once upon a time there was a fox who lived in the forest.", "Hi there", "The dog"]
PARAMS = SamplingParams.preset("exploratory", temperature=0.8, top_logprobs=3)
NAMES = ("logprobs", "alpha", "kl_base", "base_tempered_logprobs", "teacher_logprobs")


def same(found: Scores, expected: Scores, names: tuple[str, ...] = NAMES) -> None:
    assert found.error is None
    assert (found.token_ids, found.first) == (expected.token_ids, expected.first)
    for name in names:
        one, other = (getattr(scores.diagnostics, name) for scores in (found, expected))
        assert one == pytest.approx(other, abs=1e-4), name


@pytest.mark.parametrize("params", [PARAMS, SamplingParams.preset("balanced")])
def test_scores_are_those_of_the_local_engine(
    pair: Pair, urls: Urls, params: SamplingParams
) -> None:
    texts = [*TEXTS, [5 + n % 900 for n in range(ROWS + 6)]]
    expected = pair.score(texts, params)
    with Pair.http(urls.base, urls.teacher, top_k=WHOLE) as served:
        found = served.score(texts, params)
        (nothing,) = served.score([[5]], params)
    assert nothing.error is None and nothing.diagnostics.logprobs == []
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)
        for one, other in zip(ours.top or (), theirs.top or (), strict=True):
            assert [i for i, _ in one.q] == [i for i, _ in other.q]


def test_scores_of_short_lists_are_those_of_generation(urls: Urls) -> None:
    params = SamplingParams.preset("exploratory", max_tokens=24, seed=4)
    with Pair.http(urls.base, urls.teacher, top_k=20, speculation="off") as served:
        (drawn,) = served.generate(["Once upon a time"], params)
        assert drawn.prompt_token_ids is not None
        (scores,) = served.score([[*drawn.prompt_token_ids, *drawn.token_ids]], params)
    count = len(drawn.token_ids)
    for name in ("logprobs", "alpha", "tv_bound", "base_logprobs"):
        found = getattr(scores.diagnostics, name)[-count:]
        assert found == pytest.approx(getattr(drawn.diagnostics, name), abs=1e-5), name
    assert max(scores.diagnostics.tv_bound) > 0


def test_a_server_that_scores_no_ids(urls: Urls) -> None:
    with Proxy(urls.base) as base:
        base.refuse = lambda body: "logprob_token_ids" in body
        with Pair.http(base.url, urls.teacher, top_k=4) as served:
            (scores,) = served.score(["The xylophone quarrelled"])
    assert "raise top_k" in str(scores.error)


def test_texts_that_nobody_waits_for_are_dropped(urls: Urls) -> None:
    with Pair.http(urls.base, urls.teacher, max_num_seqs=1) as served:
        texts = [[5 + n % 900 for n in range(300)]] * 8
        waiting = threading.Thread(target=served.score, args=(texts,), daemon=True)
        waiting.start()
        time.sleep(0.5)
    waiting.join(30)
    assert not waiting.is_alive()


def test_echo_through_our_server(urls: Urls, pair: Pair) -> None:
    expected = pair.score([TEXTS[0]], SamplingParams.preset("exploratory"))[0]

    def opened() -> Pair:
        return Pair.http(urls.base, urls.teacher, top_k=WHOLE)

    with run_server(opened, preset="exploratory") as live:
        answer = live.complete(TEXTS[0], echo=True, max_tokens=0, logprobs=1)
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1:] == pytest.approx(expected.diagnostics.logprobs, abs=1e-4)
