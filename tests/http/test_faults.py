"""Faults between engine and real servers: the same tokens wherever trying again can help, nothing lost elsewhere."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from midlogit import Completion, Pair, SamplingParams
from midlogit.engines.http import client
from tests.http.conftest import Urls
from tests.http.proxy import Proxy
from tests.http.test_engine import PROMPTS

PARAMS = SamplingParams(max_tokens=10, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def undisturbed(urls: Urls) -> list[list[int]]:
    with Pair.http(urls.base, urls.teacher) as pair:
        return [c.token_ids for c in pair.generate(PROMPTS, PARAMS, progress=False)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits: what is tried again is tested, not how long a person would wait."""
    monkeypatch.setattr(client, "BACKOFF", (0.02, 0.05, 0.1))


def run(base: str | list[str], teacher: str | list[str], **options: object) -> list[Completion]:
    with Pair.http(base, teacher, **options) as pair:  # type: ignore[arg-type]
        return pair.generate(PROMPTS, PARAMS, progress=False)


def test_same_tokens_through_a_pause_of_five_seconds(
    proxies: tuple[Proxy, Proxy], undisturbed: list[list[int]]
) -> None:
    base, teacher = proxies
    with Pair.http(base.url, teacher.url) as pair:
        batch = pair.as_completed(PROMPTS, PARAMS)
        while teacher.calls < 8:
            time.sleep(0.01)
        teacher.stop_for(5)
        completions = sorted(batch, key=lambda c: c.index)
    assert [c.token_ids for c in completions] == undisturbed


def test_retry_after_is_honoured(proxies: tuple[Proxy, Proxy]) -> None:
    base, teacher = proxies
    with Pair.http(base.url, teacher.url) as pair:
        refused: list[float] = []

        def once(call: int) -> str:
            if not refused:
                refused.append(time.monotonic())
                return "429"
            refused.append(time.monotonic())
            return ""

        base.fault = once
        asked = SamplingParams(max_tokens=1, ignore_eos=True)
        assert pair.generate(["a fox"], asked)[0].finish_reason == "length"
    assert 0.19 <= refused[1] - refused[0] < 0.25 + 2  # the proxy asks for 0.2 s


@pytest.mark.usefixtures("quick")
def test_a_server_that_never_comes_back_ends_with_what_there_was(
    proxies: tuple[Proxy, Proxy], undisturbed: list[list[int]]
) -> None:
    base, teacher = proxies
    with Pair.http(base.url, teacher.url) as pair:
        batch = pair.as_completed(PROMPTS, PARAMS)
        while teacher.calls < 12:
            time.sleep(0.01)
        teacher.dead = True
        start = time.monotonic()
        completions = sorted(batch, key=lambda c: c.index)
        assert time.monotonic() - start < 30
        assert (
            pair.statistics()["failed_requests"]
            == sum(c.finish_reason == "error" for c in completions)
            > 0
        )
    for completion, whole in zip(completions, undisturbed, strict=True):
        assert completion.token_ids == whole[: len(completion.token_ids)]
        assert len(completion.diagnostics.alpha) == len(completion.token_ids)
        if completion.finish_reason == "error":
            assert f"teacher {teacher.url}" in completion.error and "4 attempts" in completion.error
    assert any(c.token_ids and c.text for c in completions)


@pytest.mark.usefixtures("quick")
def test_a_server_that_hangs_ends_by_the_deadline(proxies: tuple[Proxy, Proxy]) -> None:
    base, teacher = proxies
    with Pair.http(base.url, teacher.url, timeout=2.0, max_retries=1) as pair:
        base.fault = lambda call: "hang"
        start = time.monotonic()
        completion = pair.generate(["a fox"], PARAMS)[0]
        assert time.monotonic() - start < 2 * 2 + 3
    assert completion.finish_reason == "error"
    assert f"base {base.url}: no answer within 2 s" in completion.error


def test_only_the_prompt_at_fault_fails(proxies: tuple[Proxy, Proxy]) -> None:
    base, teacher = proxies
    with Pair.http(base.url, teacher.url) as pair:
        bad = pair.mixing.base.encode(PROMPTS[3])
        # A server that refuses one prompt refuses every call that holds it.
        base.refuse = lambda body: (
            bad in [list(ids[: len(bad)]) for ids in body["prompt"] if len(ids) == len(bad)]
        )
        completions = pair.generate(PROMPTS[:8], PARAMS, progress=False)
    reasons = [c.finish_reason for c in completions]
    assert reasons == ["length"] * 3 + ["error"] + ["length"] * 4
    assert "made to be refused" in completions[3].error
    assert [c.error_type for c in completions] == [None] * 3 + ["request"] + [None] * 4


@pytest.mark.usefixtures("quick")
def test_a_refusal_is_told_from_a_server_that_cannot_be_used(proxies: tuple[Proxy, Proxy]) -> None:
    """Of the first kind is what the request alone can be the cause of."""
    base, teacher = proxies
    refusals = ["400", "413", "422"]
    failures = ["302", "401", "403", "404", "408", "429", "500", "503", "reset", "truncate"]
    with Pair.http(base.url, teacher.url, max_retries=0) as pair:
        for fault in refusals + failures:
            teacher.fault = lambda _, fault=fault: fault  # type: ignore[misc]
            completion = pair.generate(["a fox"], PARAMS)[0]
            expected = "request" if fault in refusals else "engine"
            assert (completion.error_type, fault) == (expected, fault), completion.error
        teacher.fault = lambda _: ""
        assert pair.generate(["a fox"], PARAMS)[0].error_type is None


@pytest.mark.usefixtures("quick")
def test_seats_are_balanced_after_cancellations(urls: Urls) -> None:
    """Calls that fail after their sequences were cancelled move none of their seats."""
    with (
        Proxy(urls.teacher) as first,
        Proxy(urls.teacher) as second,
        Pair.http(urls.base, [first.url, second.url], max_retries=100) as pair,  # none gives up
    ):
        replicas = pair.engine.sides.teacher.replicas.replicas
        first.fault = second.fault = lambda call: "500" if call % 2 else "delay"
        for _ in range(4):
            batch = pair.as_completed(PROMPTS, replace(PARAMS, max_tokens=400))
            time.sleep(0.4)
            assert {c.finish_reason for c in batch.stop()} == {"abort"}
        while any(replica.row_calls or replica.span_calls for replica in replicas):
            time.sleep(0.01)
        assert [replica.num_slots for replica in replicas] == [0, 0]
        assert not any(replica.waiting for replica in replicas)

        first.fault = second.fault = lambda call: ""
        calls = first.calls, second.calls
        assert not any(c.error for c in pair.generate(PROMPTS, PARAMS, progress=False))
        assert first.calls > calls[0] and second.calls > calls[1]


@pytest.mark.usefixtures("quick")
def test_sequences_move_from_a_killed_replica(urls: Urls, undisturbed: list[list[int]]) -> None:
    with (
        Proxy(urls.base) as base,
        Proxy(urls.teacher) as first,
        Proxy(urls.teacher) as second,
        Pair.http(base.url, [first.url, second.url]) as pair,
    ):
        batch = pair.as_completed(PROMPTS, PARAMS)
        while first.calls < 10:
            time.sleep(0.01)
        assert second.calls > 0
        first.dead = True
        calls = first.calls
        completions = sorted(batch, key=lambda c: c.index)
        assert first.calls <= calls + 1
    assert [c.token_ids for c in completions] == undisturbed


def test_replicas_keep_their_sequences(urls: Urls) -> None:
    prefixes: list[list[tuple[int, ...]]] = [[], []]
    with (
        Proxy(urls.teacher) as first,
        Proxy(urls.teacher) as second,
        Pair.http(urls.base, [first.url, second.url]) as pair,
    ):
        for proxy, seen in zip((first, second), prefixes, strict=True):

            def note(
                path: str, body: dict[str, object], seen: list[tuple[int, ...]] = seen
            ) -> dict[str, object]:
                seen += [tuple(ids) for ids in body["prompt"]]
                return body

            proxy.rewrite_request = note
        texts = [f"{n}. {prompt}" for n, prompt in enumerate(PROMPTS)]
        completions = pair.generate(texts, PARAMS, progress=False)
        prompts = [tuple(pair.mixing.teacher.encode(text)) for text in texts]
    for completion, prompt in zip(completions, prompts, strict=True):
        at = [prompt in seen for seen in prefixes]
        last = prompt + tuple(completion.token_ids[:-1])
        assert [last in seen for seen in prefixes] == at
        assert sum(at) == 1


@pytest.mark.usefixtures("quick")
def test_a_list_cut_short_in_passing_moves_no_sequence(
    urls: Urls, undisturbed: list[list[int]]
) -> None:
    """The server is well: another of its clients had chosen ids scored."""
    lists: list[dict[str, float]] = []

    def cut_third(path: str, body: dict[str, object]) -> dict[str, object]:
        rows = [
            choice["logprobs"]["top_logprobs"]
            for choice in body.get("choices", [])
            if choice["logprobs"]
        ]
        for row in [row[0] for row in rows if len(row[0]) == 20]:
            lists.append(row)
            if len(lists) == 3:
                row.popitem()
        return body

    with (
        Proxy(urls.teacher) as first,
        Proxy(urls.teacher) as second,
        Pair.http(urls.base, [first.url, second.url]) as pair,
    ):
        first.rewrite_answer = second.rewrite_answer = cut_third
        calls = first.calls, second.calls
        completion = pair.generate(PROMPTS[:1], PARAMS, progress=False)[0]
        assert completion.token_ids == undisturbed[0]
        assert len(lists) == PARAMS.max_tokens + 1
        assert sorted([first.calls - calls[0], second.calls - calls[1]])[0] == 0


def test_a_sampling_default_of_the_server_changes_nothing(
    proxies: tuple[Proxy, Proxy], undisturbed: list[list[int]]
) -> None:
    """Every parameter that a generation_config.json can set is sent."""
    base, teacher = proxies
    bodies: list[dict[str, object]] = []

    def note(path: str, body: dict[str, object]) -> dict[str, object]:
        bodies.append(body)
        return body

    base.rewrite_request = note
    run(base.url, teacher.url)
    sent = {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    }
    rows = [body for body in bodies if "logprobs" in body]
    assert rows and all(sent | {"max_tokens", "n", "ignore_eos"} <= body.keys() for body in rows)
