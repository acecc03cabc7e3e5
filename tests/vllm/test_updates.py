"""New weights for the base of a vLLM pair, while it draws: what later tokens are drawn from, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from midlogit import InvalidRequest, Pair, SamplingParams
from midlogit.errors import WeightMismatch
from tests.questions import QUESTIONS
from tests.updates import PARAMS, REFUSED, base_logprobs, named, trained, update_midway
from tests.vllm.conftest import (
    BASE_TOKEN,
    BLOCK,
    TEACHER_TOKEN,
    engine_of,
    open_pair,
    require_empty,
    schedulers_of,
)

MANY = 64


@pytest.fixture(scope="module", params=["off", 3], ids=["lock_step", "drafting"])
def updated(request: pytest.FixtureRequest) -> Iterator[Pair]:
    caches = (3 * MANY * BLOCK * BASE_TOKEN, 3 * MANY * BLOCK * TEACHER_TOKEN)
    with open_pair(
        speculation=request.param, max_num_seqs=MANY, kv_cache_memory_bytes=caches
    ) as opened:
        yield opened


@contextmanager
def reused(pair: Pair) -> Iterator[list[int]]:
    """Counts the prompt tokens that (base, teacher) take from their prefix caches."""
    counts = [0, 0]
    managers: list[Any] = [scheduler.kv_cache_manager for scheduler in schedulers_of(pair)]
    originals = [manager.get_computed_blocks for manager in managers]

    def counting(side: int):
        def computed(*arguments):
            found = originals[side](*arguments)
            counts[side] += found[1]
            return found

        return computed

    for side, manager in enumerate(managers):
        manager.get_computed_blocks = counting(side)
    yield counts
    for manager in managers:
        del manager.get_computed_blocks


@pytest.mark.parametrize("running", ["recompute", "keep"])
def test_sixty_four_requests_go_on_under_new_weights(updated: Pair, running: Any) -> None:
    old, new = trained(1), trained(2, 0.03)
    updated.update_base(named(old).items(), version="old")
    done = update_midway(
        updated,
        lambda: updated.update_base(named(new).items(), version="new", running=running),
        MANY,
    )
    for completion in done:
        first, second = completion.weight_versions
        assert first[:2] == ("old", 0) and second == ("new", first.end, 16)
        found = completion.diagnostics.base_logprobs
        before = base_logprobs(old, completion, updated)[: first.end]
        after = base_logprobs(new, completion, updated)[first.end :]
        assert found[: first.end] == pytest.approx(before, abs=1e-4)
        assert (found[first.end :] == pytest.approx(after, abs=1e-4)) is (running == "recompute")
    require_empty(updated)


def test_requests_that_have_begun_may_be_aborted(updated: Pair) -> None:
    weights = named(trained(2))
    done = update_midway(
        updated, lambda: updated.update_base(weights.items(), running="abort"), MANY + 3
    )
    assert [c.finish_reason for c in done] == ["abort"] * MANY + ["length"] * 3
    assert all(len(c.token_ids) < 16 for c in done[:MANY])
    require_empty(updated)


@pytest.mark.parametrize("running", ["recompute", "keep"])
def test_only_the_teacher_keeps_its_prefixes(updated: Pair, running: Any) -> None:
    prompts, short = [" ".join(["river"] * 100)] * 2, SamplingParams(max_tokens=1)
    updated.generate(prompts[:1], short)
    for expected in (3 * 32, 0):  # of the base: before and after the update
        with reused(updated) as counts:
            updated.generate(prompts[:1], short)
        assert counts == [expected, 3 * 32]
        updated.update_base(named(trained(1)).items(), running=running)


@pytest.mark.parametrize("case", ["torn", "missing", "unknown", "nan", "shape"])
def test_weights_that_do_not_fit_leave_everything_as_it_is(
    case: str, tmp_path: Path, updated: Pair
) -> None:
    make, message = REFUSED[case]
    weights = make(tmp_path)
    updated.update_base(named(trained(1)).items(), version="old")
    expected = updated.generate(QUESTIONS[:3], PARAMS, chat=True)

    def update() -> None:
        with pytest.raises(WeightMismatch, match=message):
            updated.update_base(weights)

    for one, other in zip(update_midway(updated, update, 3), expected, strict=True):
        assert one.token_ids == other.token_ids and one.weight_versions == [("old", 0, 16)]


def test_pause_and_resume(updated: Pair) -> None:
    done = update_midway(updated, lambda: (updated.pause(), updated.resume()), MANY)  # type: ignore[arg-type,return-value]
    assert {c.finish_reason for c in done} == {"length"}
    updated.pause("wait")
    updated.resume()
    require_empty(updated)


def test_refusals(updated: Pair) -> None:
    with pytest.raises(InvalidRequest, match="does not change by itself"):
        updated.update_base()
    with pytest.raises(InvalidRequest, match="opened without weight transfer"):
        engine_of(updated).start_weight_update()
