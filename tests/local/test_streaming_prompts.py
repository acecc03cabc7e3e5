"""Prompts of any iterable: read in a window, none kept, each as if all had been there."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import pytest

from midlogit import InvalidRequest, Pair, SamplingParams
from midlogit.engines.base import Engine
from midlogit.engines.draft_length import DraftLength
from midlogit.pair import WINDOW
from midlogit.requests.sequence import Sequence

PROMPTS = [f"The fox number {n % 7}" for n in range(40)]
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True, n=2)


class Ends(Engine):
    """Ends each sequence at once, before a token."""

    def submit(self, sequence: Sequence) -> None:
        sequence.abort()

    def abort(self, sequences: list[Sequence]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("seed", [None, 5])
def test_memory_does_not_grow_with_the_number_of_prompts(pair: Pair, seed: int | None) -> None:
    count, checked_after = 10_000, 2_500
    instant = Pair(pair.mixing, Ends(DraftLength("off"), max_num_seqs=64))
    read = delivered = kept = before = 0

    def prompts() -> Iterator[list[int]]:
        nonlocal read
        for read in range(1, count + 1):
            yield [300 + read % 3000, 300 + read // 3000]

    batch = instant.as_completed(prompts(), SamplingParams(seed=seed))
    tracemalloc.start(1)
    for delivered, _ in enumerate(batch, 1):
        assert read - delivered <= WINDOW * 64
        if delivered in (checked_after, count):
            gc.collect()
            before, kept = kept, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert read == delivered == count
    counted = 120 * (count - checked_after) if seed is not None else 0
    assert kept - before < counted + 2**20


def test_no_more_prompts_are_read_than_there_is_room_for() -> None:
    read = 0

    def prompts() -> Iterator[list[int]]:
        nonlocal read
        for read in range(1, 201):
            yield [300 + read]

    with Pair.local(dtype="float32", device="cpu", max_num_seqs=8, speculation="off") as pair:
        batch = pair.as_completed(prompts(), SamplingParams(max_tokens=1, ignore_eos=True))
        assert read == WINDOW * 8
        for delivered, completion in enumerate(batch, 1):
            assert read - delivered <= WINDOW * 8 and completion.finish_reason == "length"
    assert read == delivered == 200


def test_the_same_tokens_as_of_a_list(pair: Pair) -> None:
    seeded = SamplingParams(max_tokens=3, ignore_eos=True, n=2, seed=4)
    for ids in (None, [f"row {n}" for n in range(len(PROMPTS))]):
        expected = pair.generate(PROMPTS, seeded, request_ids=ids, progress=False)
        for names in (ids, None if ids is None else iter(ids)):
            found = sorted(
                pair.as_completed(iter(PROMPTS), seeded, request_ids=names),
                key=lambda c: (c.index, c.sample),
            )
            assert [(c.index, c.sample, c.token_ids) for c in found] == [
                (c.index, c.sample, c.token_ids) for c in expected
            ]


def test_each_side_has_an_iterator_of_its_own(pair: Pair) -> None:
    found = pair.as_completed(
        base_prompts=(f"base {n}" for n in range(3)),
        teacher_prompts=[f"teacher {n}" for n in range(3)],
        params=PARAMS,
    )
    assert {(c.base_prompt, c.prompt) for c in found} == {
        (f"base {n}", f"teacher {n}") for n in range(3)
    }


def test_a_prompt_at_fault_ends_what_runs(pair: Pair) -> None:
    long = SamplingParams(max_tokens=900, ignore_eos=True)
    read: list[str] = []

    def prompts() -> Iterator[str]:
        for prompt in [*PROMPTS, "", *PROMPTS]:
            read.append(prompt)
            yield prompt

    room = WINDOW * pair.engine.max_num_seqs
    batch = pair.as_completed(prompts(), long)
    assert len(read) == room
    batch.stop()
    assert batch.is_over and len(read) == room

    read.clear()
    short = pair.as_completed(prompts(), SamplingParams(max_tokens=2, ignore_eos=True))
    with pytest.raises(InvalidRequest, match="base prompt 40 is empty"):
        list(short)
    assert len(read) == 41
    rest = short.stop()
    assert {c.finish_reason for c in rest} <= {"abort", "length"}
    assert short.is_over and list(short) == []

    lenient = pair.as_completed(prompts(), PARAMS, strict=False)
    errors = [c.index for c in lenient if c.error_type == "request"]
    assert errors == [40, 40]


def test_what_the_iterator_raises_is_raised(pair: Pair) -> None:
    def broken() -> Iterator[str]:
        yield from PROMPTS
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(pair.as_completed(broken(), PARAMS))


def test_iterators_that_cannot_be_honoured(pair: Pair) -> None:
    empty: list[str] = []
    refused = {
        "There are no prompts": {"prompts": iter(empty)},
        "request_ids and prompts differ": {"prompts": iter(PROMPTS), "request_ids": ["a"]},
        "prompts and request_ids differ": {"prompts": iter(PROMPTS), "request_ids": iter("ab")},
        "request_ids is one text": {"prompts": iter(PROMPTS), "request_ids": "ab"},
        "request_ids holds 1": {"prompts": iter(PROMPTS), "request_ids": iter([1])},
        "base_prompts and teacher_prompts differ": {
            "base_prompts": iter("ab"),
            "teacher_prompts": iter("abc"),
        },
        "no prompt is a chat": {
            "prompts": iter(PROMPTS),
            "chat_template_kwargs": {"enable_thinking": False},
        },
    }
    for says, call in refused.items():
        says = says.replace("request_ids and prompts", "prompts and request_ids")
        with pytest.raises(InvalidRequest, match=says):
            list(pair.as_completed(params=PARAMS, **call))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="as_completed takes any iterable"):
        pair.generate(iter(PROMPTS), PARAMS)  # type: ignore[arg-type]
