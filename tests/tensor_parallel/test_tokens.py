"""Two ranks against the local engine, and against each other."""

from __future__ import annotations

import gc
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from midlogit import EqualKL, InvalidRequest, Pair, SamplingParams
from midlogit.engines.vllm.lockstep import Lockstep
from tests.conftest import TEACHER
from tests.questions import QUESTIONS
from tests.tensor_parallel.models import widened, write_widened
from tests.updates import named, trained
from tests.vllm.test_engine import require_equal
from tests.vllm.test_guesses import Guessing

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = [" ".join(["river"] * (11 * n % 90)) + QUESTIONS[n] for n in range(8)]
BASE_PROMPTS = [" ".join(["stone"] * (37 * n % 110)) + QUESTIONS[n + 5] for n in range(8)]
CALLS, PROMPTS_EACH = (200 if torch.cuda.is_available() else 30), 10


def state(lockstep: Lockstep) -> tuple[Any, ...]:
    """What must be the same on every rank: all that was scheduled and drawn, the free blocks, the choice of γ."""
    blocks = [(core.free_blocks, core.blocks, core.is_empty) for core in lockstep.cores]
    return lockstep.checksum, blocks, lockstep.draft_length.statistics()


def frozen(lockstep: Lockstep) -> int:
    """How many objects a rank keeps out of garbage collection."""
    return gc.get_freeze_count()


def states(pair: Pair) -> list[tuple[Any, ...]]:
    engine: Any = pair.engine
    return engine.between_steps(lambda: engine.on_every_rank(state))


@contextmanager
def preemptions(pair: Pair) -> Iterator[list[int]]:
    """Counts the preemptions of (base, teacher) on rank 0."""
    counts = [0, 0]
    schedulers: list[Any] = [core._scheduler for core in pair.engine.cores]  # type: ignore[attr-defined]
    for side, scheduler in enumerate(schedulers):

        def counting(*args, side=side, preempt=scheduler._preempt_request, **kwargs):
            counts[side] += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counting
    yield counts
    for scheduler in schedulers:
        del scheduler._preempt_request


def test_tokens_equal_those_of_one_rank(pair: Pair, shared: Pair) -> None:
    """In float32, chunks and drafts among them; `pair` is the local engine with the bundled base itself."""
    found = shared.generate(PROMPTS, GREEDY, base_prompts=BASE_PROMPTS)
    require_equal(found, pair.generate(PROMPTS, GREEDY, base_prompts=BASE_PROMPTS))
    assert shared.statistics()["speculation"]["accepted"] > 0
    for ours, theirs in zip(
        shared.score(PROMPTS[:3], base_prompts=PROMPTS[:3]),
        pair.score(PROMPTS[:3], base_prompts=PROMPTS[:3]),
        strict=True,
    ):
        assert ours.diagnostics.logprobs == pytest.approx(theirs.diagnostics.logprobs, abs=1e-4)


def test_ranks_agree_on_what_depends_on_time_and_text(shared: Pair) -> None:
    """Aborts, preemptions, chunks, stop strings and `auto`: none is lost, and no block is held on either rank."""
    chance, counts = random.Random(5), Counter()
    batches = []
    with preemptions(shared) as preempted:
        for number in range(CALLS):
            prompts = [" ".join(["word"] * chance.randrange(1, 60)) for _ in range(PROMPTS_EACH)]
            base_prompts = [
                " ".join(["river"] * chance.randrange(1, 60)) for _ in range(PROMPTS_EACH)
            ]
            asked = SamplingParams(
                max_tokens=chance.randrange(1, 30),
                seed=number,
                ignore_eos=chance.random() < 0.5,
                stop=("the", "a") if number % 3 == 0 else (),
            )
            batches.append(shared.as_completed(prompts, asked, base_prompts=base_prompts))
        for batch in batches:
            whole = chance.random() < 0.7
            ended = [*itertools.islice(batch, None if whole else chance.randrange(PROMPTS_EACH))]
            ended += [] if whole else batch.stop()
            counts.update((c.finish_reason, isinstance(c.stop_reason, str)) for c in ended)

    assert counts.total() == CALLS * PROMPTS_EACH
    assert min(counts[how] for how in (("abort", False), ("stop", True), ("length", False))) > 10
    assert min(preempted) > 0
    shared.generate(QUESTIONS[:1], GREEDY)
    first, second = states(shared)
    assert first == second
    assert all(free == blocks and is_empty for free, blocks, is_empty in first[1])


def guess_always(lockstep: Lockstep) -> None:
    """Has a rank guess wherever it can."""
    lockstep.draft_length = Guessing(3)


def test_ranks_guess_the_same(pair: Pair, shared: Pair) -> None:
    engine: Any = shared.engine
    engine.between_steps(lambda: engine.on_every_rank(guess_always))
    prompts = [" ".join(["river"] * 20)]
    asked = SamplingParams(n=3, temperature=0.3, seed=2, max_tokens=60, ignore_eos=True)
    found = shared.generate(prompts, asked)
    require_equal(found, pair.generate(prompts, asked))
    assert engine.lockstep.draft_length.statistics()["guesses_stood"] > 10
    first, second = states(shared)
    assert first == second


def test_no_rank_holds_up_the_others_with_garbage_collection(shared: Pair) -> None:
    engine: Any = shared.engine
    counts = engine.between_steps(lambda: engine.on_every_rank(frozen))
    assert min(counts) > 10_000


def test_a_rank_that_differs_ends_the_pair_of_its_step(shared: Pair) -> None:
    """The guard of the test above, without ending the pair for the others."""
    lockstep = shared.engine.lockstep  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="drawn different tokens"):
        lockstep.step(None, lockstep.checksum + 1)


@pytest.mark.parametrize("form", ["tensors", "folder"])
def test_new_weights_reach_every_rank(form: str, shared: Pair, tmp_path: Path) -> None:
    folder = write_widened(tmp_path / "base")
    weights = widened(named(trained(seed=3)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Pair.local(folder, TEACHER, dtype="float32", device="cpu") as local:
        expected = local.generate(QUESTIONS[:4], GREEDY)
    before = shared.generate(QUESTIONS[:4], GREEDY)

    shared.update_base(weights.items() if form == "tensors" else folder)
    found = shared.generate(QUESTIONS[:4], GREEDY)
    shared.update_base(write_widened(tmp_path / "before"))

    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [c.token_ids for c in before] != [c.token_ids for c in expected]
    assert [c.token_ids for c in shared.generate(QUESTIONS[:4], GREEDY)] == [
        c.token_ids for c in before
    ]
    with pytest.raises(InvalidRequest, match="shared by 2 devices"):
        shared.engine.base_checksum()  # type: ignore[attr-defined]


def test_a_rule_that_other_ranks_cannot_load_is_refused(shared: Pair) -> None:
    @dataclass(frozen=True)
    class Mine(EqualKL):
        pass

    (refused,) = shared.generate(["Once"], SamplingParams(max_tokens=3, alpha_rule=Mine()))
    assert refused.error_type == "request" and "cannot load Mine" in refused.error
