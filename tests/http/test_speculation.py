"""Speculation between two real servers: the same law, fewer calls, the same tokens wherever a seed promises them.

MIDLOGIT_CONTINUATIONS=5000 makes the two-sample test as large as that.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import Any

import pytest

from midlogit import Completion, InvalidRequest, Pair, SamplingParams
from midlogit.engines.http import client
from midlogit.errors import ServerUnavailable
from tests.http.conftest import WHOLE, Urls
from tests.http.proxy import Proxy
from tests.http.test_engine import BASE_PROMPTS, GREEDY, PROMPTS
from tests.law import continuations, same_law_ps

CONTINUATIONS = int(os.environ.get("MIDLOGIT_CONTINUATIONS", "64"))
SAMPLED = SamplingParams(max_tokens=16, seed=11, ignore_eos=True)


def both(pair: Pair, params: SamplingParams, prompts: int = 6) -> list[Completion]:
    return pair.generate(
        base_prompts=BASE_PROMPTS[:prompts],
        teacher_prompts=PROMPTS[:prompts],
        params=params,
        progress=False,
    )


@pytest.fixture(scope="module")
def lockstep(urls: Urls) -> Pair:
    with Pair.http(urls.base, urls.teacher, speculation="off") as opened:
        yield opened


@pytest.fixture(scope="module")
def four(urls: Urls) -> Pair:
    with Pair.http(urls.base, urls.teacher, speculation=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def undisturbed(four: Pair) -> list[list[int]]:
    return [c.token_ids for c in both(four, SAMPLED)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits: what is tried again is tested, not how long a person would wait."""
    monkeypatch.setattr(client, "BACKOFF", (0.02, 0.05, 0.1))


@pytest.mark.parametrize(
    ("top_k", "preset"), [(20, "balanced"), (20, "exploratory"), (WHOLE, "exploratory")], ids=str
)
def test_greedy_text_is_that_of_lockstep(
    urls: Urls, lockstep: Pair, top_k: int, preset: str
) -> None:
    params = SamplingParams.preset(preset, max_tokens=20 if top_k == 20 else 7, temperature=0)
    prompts = 6 if top_k == 20 else 2
    with Pair.http(urls.base, urls.teacher, top_k=top_k, speculation=0) as pair:
        expected = both(pair, params, prompts)
    for drafts in (1, 4):
        with Pair.http(urls.base, urls.teacher, top_k=top_k, speculation=drafts) as pair:
            found = both(pair, params, prompts)
            assert pair.statistics()["speculation"]["accepted"] > 0
        for a, b in zip(expected, found, strict=True):
            assert (b.token_ids, b.text, b.finish_reason) == (a.token_ids, a.text, a.finish_reason)
            for name in (
                "alpha",
                "kl_base",
                "coverage",
                "tv_bound",
                "alpha_bound",
                "logprobs",
                "base_logprobs",
            ):
                assert getattr(b.diagnostics, name) == pytest.approx(
                    getattr(a.diagnostics, name), abs=1e-3
                ), name


def test_sampled_continuations_follow_the_law_of_lockstep(lockstep: Pair, four: Pair) -> None:
    together = min(CONTINUATIONS, 250)
    samples = [
        continuations(pair, seed, CONTINUATIONS, together)
        for pair, seed in ((lockstep, 1), (four, 2))
    ]
    ps = same_law_ps(*samples)
    print(f"p-values of {len(samples[0])} and {len(samples[1])} continuations: {ps}")
    assert min(ps.values()) > 1e-3


@pytest.mark.usefixtures("quick")
def test_sequences_move_from_a_killed_replica(urls: Urls, undisturbed: list[list[int]]) -> None:
    with (
        Proxy(urls.base) as first,
        Proxy(urls.base) as second,
        Pair.http([first.url, second.url], urls.teacher, speculation=4) as pair,
    ):
        calls = first.calls
        batch = pair.as_completed(
            base_prompts=BASE_PROMPTS[:6], teacher_prompts=PROMPTS[:6], params=SAMPLED
        )
        while first.calls < calls + 6:
            time.sleep(0.01)
        first.dead = True
        completions = sorted(batch, key=lambda c: c.index)
    assert [c.error for c in completions] == [None] * len(completions)
    assert [c.token_ids for c in completions] == undisturbed


def test_a_seed_draws_the_same_alone_and_in_a_batch(
    four: Pair, undisturbed: list[list[int]]
) -> None:
    for n in (0, 5):
        alone = four.generate(
            base_prompts=[BASE_PROMPTS[n]], teacher_prompts=[PROMPTS[n]], params=SAMPLED
        )[0]
        assert alone.token_ids == undisturbed[n]


def test_auto_drafts_nothing_that_would_change_what_a_seed_draws(
    urls: Urls, lockstep: Pair
) -> None:
    with Pair.http(urls.base, urls.teacher) as pair:
        assert [c.token_ids for c in both(pair, SAMPLED)] == [
            c.token_ids for c in both(lockstep, SAMPLED)
        ]
        assert pair.statistics()["speculation"]["rounds"] == 0
    for params in (replace(SAMPLED, seed=None), replace(SAMPLED, temperature=0)):
        with Pair.http(urls.base, urls.teacher) as pair:  # a new one: "auto" tries drafts first
            assert not any(c.error for c in both(pair, params))
            assert pair.statistics()["speculation"]["rounds"] > 0


def test_statistics_tell_what_became_of_drafts(four: Pair, lockstep: Pair) -> None:
    before = four.statistics()["speculation"]
    drawn = sum(len(c.token_ids) for c in both(four, SAMPLED))
    after = four.statistics()["speculation"]
    rounds, accepted = (after[name] - before[name] for name in ("rounds", "accepted"))
    assert (
        rounds + accepted + 6 <= drawn + 6 and rounds + accepted >= drawn - 2 * 6
    )  # the first and a last without
    assert len(after["acceptance_by_position"]) == 4 and after["drafts_in_use"] == {"all": 4}
    assert lockstep.statistics()["speculation"]["acceptance"] is None


@pytest.mark.parametrize("preset", ["balanced", "exploratory"])
def test_calls_for_a_token_fall_to_a_third(proxies: tuple[Proxy, Proxy], preset: str) -> None:
    calls: dict[int, float] = {}
    for drafts in (0, 4):
        with Pair.http(proxies[0].url, proxies[1].url, speculation=drafts) as pair:
            before, drawn = sum(proxy.calls for proxy in proxies), 0
            for temperature in (0.0, 1.0):
                params = SamplingParams.preset(
                    preset, max_tokens=48, seed=5, ignore_eos=True, temperature=temperature
                )
                for prompt in PROMPTS[4:5]:
                    drawn += len(pair.generate([prompt], params)[0].token_ids)
            calls[drafts] = (sum(proxy.calls for proxy in proxies) - before) / drawn
    print(f"{preset}: calls a token {calls[0]:.2f} in lock-step, {calls[4]:.2f} with four drafts")
    assert calls[4] <= 0.35 * calls[0]


def test_stop_strings_limits_and_streams(four: Pair, lockstep: Pair) -> None:
    params = SamplingParams(max_tokens=23, temperature=0, ignore_eos=True)
    whole = lockstep.generate(["a fox"], params)[0]
    *tokens, completion = four.stream("a fox", params)
    assert completion.text == whole.text == "".join(token.text for token in tokens)
    stop = whole.text[9:13]
    cut = four.generate(["a fox"], replace(params, stop=(stop,)))[0]
    assert (cut.text, cut.stop_reason) == (whole.text[: whole.text.index(stop)], stop)
    for most in range(1, 8):
        assert (
            four.generate(["a fox"], replace(params, max_tokens=most))[0].token_ids
            == whole.token_ids[:most]
        )
    held = replace(
        SAMPLED, ignore_eos=False, min_tokens=16, temperature=2.5
    )  # hotter than servers draw
    assert {c.finish_reason for c in both(four, held)} == {"length"}


def test_a_context_filled_to_the_end(four: Pair) -> None:
    room = four.mixing.base.max_context - 490
    completion = four.generate([[7] * 490], replace(SAMPLED, max_tokens=400))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (room, "length")


def test_numbers_that_cannot_be(urls: Urls) -> None:
    for drafts in (-1, 17, "many"):
        with pytest.raises(InvalidRequest, match="0 to 16"):
            Pair.http(urls.base, urls.teacher, speculation=drafts)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="give top_k a number"):
        Pair.http(urls.base, urls.teacher, speculation=4, top_k="auto")
    for drafts in ("auto", "off", 0):
        Pair.http(urls.base, urls.teacher, speculation=drafts, top_k="auto").close()  # type: ignore[arg-type]


def test_a_server_that_ignores_the_seed(
    proxies: tuple[Proxy, Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    base, teacher = proxies
    base.rewrite_request = lambda path, body: {
        name: value for name, value in body.items() if name != "seed"
    }
    with pytest.raises(ServerUnavailable, match="other tokens from the same seed") as caught:
        Pair.http(base.url, teacher.url, speculation=2)
    assert f"base {base.url}" in str(caught.value) and "turn speculation off" in str(caught.value)
    with caplog.at_level("WARNING", logger="midlogit"), Pair.http(base.url, teacher.url) as pair:
        assert pair.generate(["a fox"], GREEDY)[0].error is None
        assert pair.statistics()["speculation"]["rounds"] == 0
    assert f"base {base.url} cannot draft" in caplog.text


def test_a_server_that_ignores_the_temperature(proxies: tuple[Proxy, Proxy]) -> None:
    base, teacher = proxies
    base.rewrite_request = lambda path, body: (
        {**body, "temperature": 0.0} if "seed" in body else body
    )
    with pytest.raises(ServerUnavailable, match="whatever temperature and seed"):
        Pair.http(base.url, teacher.url, speculation=2)


@pytest.mark.usefixtures("quick")
def test_a_drawn_token_that_its_own_list_does_not_name(proxies: tuple[Proxy, Proxy]) -> None:
    base, teacher = proxies

    def rename(path: str, answer: Any) -> Any:
        tokens = answer["choices"][0]["logprobs"]["tokens"] if path.endswith("/completions") else []
        if len(tokens) == 5:
            tokens[2] = "token_id:4095"
        return answer

    with Pair.http(base.url, teacher.url, speculation=4) as pair:
        base.rewrite_answer = rename
        completion = pair.generate(["a fox"], SAMPLED)[0]
    assert (
        completion.finish_reason == "error" and len(completion.token_ids) == 1 and completion.text
    )
    assert f"base {base.url}" in completion.error and "drew token 4095" in completion.error
    assert math.isfinite(completion.diagnostics.alpha[0])
