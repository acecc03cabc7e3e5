"""A running batch: it takes requests at any time, and keeps nothing of what it delivered."""

from __future__ import annotations

import gc
import time
import weakref

import pytest

from midlogit import Completion, EngineFailure, Pair, SamplingParams
from midlogit.delivery import Batch
from midlogit.requests.prompts import Reading
from midlogit.requests.sequence import Request

PROMPTS = [f"The fox number {n}" for n in range(12)]
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, seed=3)


def requests_of(pair: Pair, prompts: list[str]) -> list[Request]:
    return pair.prepare(prompts, PARAMS, Reading(), strict=False)


def drain(batch: Batch) -> list[Completion]:
    return [c for c in iter(lambda: batch.poll(30), None) if isinstance(c, Completion)]


def test_requests_are_submitted_while_others_run(pair: Pair) -> None:
    requests = requests_of(pair, PROMPTS)
    batch = pair.start([])
    assert batch.is_over and batch.num_running == 0 and batch.poll(0) is None

    batch.submit(requests[:4])
    assert batch.num_running == 4
    found = [next(batch)]
    batch.submit(requests[4:])
    assert batch.num_running == len(requests) - 1

    found += batch
    assert batch.is_over and batch.num_running == 0
    found.sort(key=lambda c: c.index)
    assert [c.token_ids for c in found] == [
        c.token_ids for c in pair.generate(PROMPTS, PARAMS, progress=False)
    ]


def test_a_refused_request_is_no_fault_of_the_engine(pair: Pair) -> None:
    batch = pair.start(requests_of(pair, [PROMPTS[0], "word " * 2000]))
    found = sorted(batch, key=lambda c: c.index)
    assert [c.error_type for c in found] == [None, "request"]
    assert "error_type" not in found[0].to_dict() and found[1].to_dict()["error_type"] == "request"


def test_stopping_returns_what_was_not_delivered(pair: Pair) -> None:
    long = pair.prepare(PROMPTS, SamplingParams(max_tokens=800, ignore_eos=True), Reading())
    batch = pair.start(requests_of(pair, PROMPTS[:1]))
    first = next(batch)
    batch.submit(long)
    rest = batch.stop()
    assert (first.finish_reason, first.index) == ("length", 0)
    assert [(c.finish_reason, c.index) for c in rest] == [("abort", n) for n in range(12)]
    assert batch.is_over and batch.poll(0) is None

    batch.submit(requests_of(pair, PROMPTS[:1]))
    assert [c.token_ids for c in batch] == [first.token_ids]


def test_nothing_is_kept_of_what_was_delivered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[weakref.ref[object]] = []
    monkeypatch.setattr(pair, "observer", lambda sequence: ended.append(weakref.ref(sequence)))
    batch = pair.start(requests_of(pair, PROMPTS))
    for _ in batch:
        pass

    deadline = time.monotonic() + 30
    while any(sequence() is not None for sequence in ended) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(ended) == len(PROMPTS) and not any(sequence() for sequence in ended)


def test_an_engine_that_dies_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair.local(dtype="float32", device="cpu", max_num_seqs=2, speculation="off") as pair:
        assert pair.engine.max_num_seqs == 2
        advance = pair.engine.base.advance

        def fail_at_the_third(tokens: list[list[int]]) -> object:
            if pair.statistics()["total_requests"] >= 2:
                raise RuntimeError("the device is gone")
            return advance(tokens)

        monkeypatch.setattr(pair.engine.base, "advance", fail_at_the_third)
        requests = requests_of(pair, PROMPTS[:5])
        batch = pair.start(requests)
        found = sorted(batch, key=lambda c: c.index)
        assert [c.error_type for c in found] == [None, None, "engine", "engine", "engine"]
        assert all("the device is gone" in str(c.error) for c in found[2:])

        with pytest.raises(EngineFailure, match="the device is gone"):
            batch.submit(requests[:1])
        assert batch.is_over and batch.stop() == []
