"""Random schedules of faults over real servers (`make test-faults`): the tokens of an undisturbed run, no lost seat.

A schedule is drawn from its seed alone; which request meets which fault depends on the order of calls.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from midlogit import Completion, Pair, SamplingParams
from midlogit.engines.http import client
from midlogit.models.checkpoint import bundled
from tests.http.conftest import FLAGS, Urls
from tests.http.proxy import Proxy
from tests.http.servers import Server
from tests.http.test_answers import FAULTS
from tests.http.test_engine import PROMPTS

SCHEDULES = 12
TEXTS = [f"{prompt} {n}" for n in range(3) for prompt in PROMPTS]  # 48 requests a schedule
PARAMS = SamplingParams(max_tokens=6, seed=11, ignore_eos=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.02, 0.05, 0.1))


@pytest.fixture(scope="module")
def undisturbed(urls: Urls) -> dict[str | int, list[list[int]]]:
    """Tokens by the number of drafts."""
    tokens: dict[str | int, list[list[int]]] = {}
    for speculation in ("off", 4):
        with Pair.http(urls.base, urls.teacher, speculation=speculation) as pair:
            tokens[speculation] = [c.token_ids for c in generate(pair)]
    return tokens


def generate(pair: Pair) -> list[Completion]:
    found = pair.generate(TEXTS, PARAMS, progress=False)
    assert {c.error for c in found} == {None}
    assert {tuple(c.weights_changed) for c in found} == {()}
    return found


def schedule(seed: str) -> Callable[[int], str]:
    """Of three calls about one meets a fault; one of 200 is never answered."""

    def fault(call: int) -> str:
        draw = random.Random(f"{seed} {call}")
        if draw.random() < 0.005:
            return "hang"
        return draw.choice(FAULTS) if draw.random() < 0.3 else ""

    return fault


@contextmanager
def outages(proxies: list[Proxy], seed: str) -> Iterator[None]:
    """One proxy after another is dead for a quarter of a second, with pauses between."""
    over = threading.Event()
    draw = random.Random(seed)

    def run() -> None:
        while not over.wait(draw.uniform(0.5, 1.5)):
            proxy = draw.choice(proxies)
            proxy.dead = True
            over.wait(0.25)
            proxy.dead = False

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_tokens_through_a_schedule(
    urls: Urls, undisturbed: dict[str | int, list[list[int]]], seed: int
) -> None:
    """Every other one drafts; two of three have two replicas of the teacher; all abandon requests on the way."""
    speculation: str | int = "off" if seed % 2 else 4
    with ExitStack() as stack:
        base = stack.enter_context(Proxy(urls.base))
        teachers = [stack.enter_context(Proxy(urls.teacher)) for _ in range(1 + (seed % 3 > 0))]
        pair = stack.enter_context(
            Pair.http(
                base.url,
                [proxy.url for proxy in teachers],
                speculation=speculation,  # type: ignore[arg-type]
                max_retries=50,
                timeout=10.0,
            )
        )
        for n, proxy in enumerate([base, *teachers]):
            proxy.fault = schedule(f"{seed} {n}")
        with outages([base, *teachers], str(seed)):
            abandoned = pair.as_completed(TEXTS, replace(PARAMS, max_tokens=200))
            time.sleep(1)
            assert "abort" in {c.finish_reason for c in abandoned.stop()}
            found = generate(pair)
        assert [c.token_ids for c in found] == undisturbed[speculation]
        require_no_seats(pair)


def require_no_seats(pair: Pair) -> None:
    """All seats are given back once the calls of abandoned requests have ended."""
    deadline = time.monotonic() + 60
    for side in (pair.engine.sides.base, pair.engine.sides.teacher):
        for replica in side.replicas.replicas:
            while replica.row_calls or replica.span_calls:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert (replica.num_slots, replica.waiting) == (0, [])


def test_a_killed_server_takes_part_again(
    urls: Urls, undisturbed: dict[str | int, list[list[int]]]
) -> None:
    """A second server of the teacher is killed amid requests, and started again on its port."""
    second = Server(bundled("teacher"), *FLAGS)
    try:
        second.wait()
        with (
            Proxy(second.url) as watched,
            Pair.http(urls.base, [urls.teacher, watched.url], speculation="off") as pair,
        ):
            batch = pair.as_completed(TEXTS, PARAMS)
            calls = watched.calls
            while watched.calls < calls + 3:
                time.sleep(0.01)
            second.kill()
            found = sorted(batch, key=lambda c: c.index)
            assert [c.token_ids for c in found] == undisturbed["off"]

            second = Server(bundled("teacher"), *FLAGS, port=second.port)
            second.wait()
            up = time.monotonic()
            answers = count_answers(watched)
            while not answers:
                assert [c.token_ids for c in generate(pair)] == undisturbed["off"]
            assert answers[0] - up < 10
            require_no_seats(pair)
    finally:
        second.stop()


def count_answers(proxy: Proxy) -> list[float]:
    """Times of the answers with rows from now on."""
    times: list[float] = []

    def note(path: str, answer: object) -> object:
        if path.endswith("/completions"):
            times.append(time.monotonic())
        return answer

    proxy.rewrite_answer = note
    return times
