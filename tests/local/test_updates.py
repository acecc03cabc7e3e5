"""New weights for the local engine's base: what they draw, what becomes of running requests, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from midlogit import InvalidRequest, Pair, SamplingParams
from midlogit.engines.local.engine import LocalEngine
from midlogit.errors import EngineFailure, WeightMismatch
from midlogit.requests.prompts import Reading
from tests.conftest import BASE, TEACHER
from tests.questions import QUESTIONS
from tests.updates import PARAMS, REFUSED, base_logprobs, named, resident_mb, trained, update_midway

LONG = SamplingParams.preset("exploratory", max_tokens=200, seed=3, ignore_eos=True)
READING = Reading(chat=True)


def opened(base: Any = BASE, teacher: Any = TEACHER, **options: Any) -> Pair:
    return Pair.local(base, teacher, device="cpu", dtype="float32", **options)


def engine_of(pair: Pair) -> LocalEngine:
    engine = pair.engine
    assert isinstance(engine, LocalEngine)
    return engine


def test_each_update_draws_as_a_fresh_pair_does(tmp_path: Path) -> None:
    with opened(speculation="off") as pair:
        assert pair.base_version is None
        assert not pair.generate(QUESTIONS[:1], PARAMS)[0].weight_versions
        teacher = engine_of(pair).teacher.model
        for n in range(1, 4):
            model = trained(n)
            if n == 2:
                model.save_pretrained(tmp_path)
            pair.update_base(tmp_path if n == 2 else named(model).items())
            assert pair.base_version == n
            done = pair.generate(QUESTIONS[:3], PARAMS, chat=True)

            with opened(model, teacher, speculation="off") as fresh:
                expected = fresh.generate(QUESTIONS[:3], PARAMS, chat=True)
            for one, other in zip(done, expected, strict=True):
                assert one.token_ids == other.token_ids
                assert one.diagnostics.logprobs == pytest.approx(
                    other.diagnostics.logprobs, abs=1e-4
                )
                assert one.weight_versions == [(n, 0, 16)]
                spans = orjson.loads(orjson.dumps(one.to_dict()))["weight_versions"]
                assert spans == [{"version": n, "start": 0, "end": 16}]


@pytest.mark.parametrize("speculation", ["off", 2])
def test_running_requests_are_computed_anew(speculation: Any) -> None:
    model, old = trained(1, 0.03), trained(0, 0.0)
    with opened(speculation=speculation, max_num_seqs=4) as pair:
        done = update_midway(
            pair, lambda: pair.update_base(named(model).items(), version="new"), count=6
        )
        for completion in done:
            versions = completion.weight_versions
            start = versions[0].start
            assert {span.version for span in versions} == {"new"} and versions[-1].end == 16
            found = completion.diagnostics.base_logprobs
            before = base_logprobs(old, completion, pair)
            after = base_logprobs(model, completion, pair)
            assert found[:start] == pytest.approx(before[:start], abs=1e-4)
            assert found[start:] == pytest.approx(after[start:], abs=1e-4)
        assert {c.weight_versions[0].start > 0 for c in done} == {True, False}


def test_running_requests_may_keep_their_caches_or_be_aborted() -> None:
    model = trained(1, 0.03)
    with opened(speculation="off") as pair:
        kept = update_midway(pair, lambda: pair.update_base(named(model).items(), running="keep"))
        for completion in kept:
            start = completion.weight_versions[0].start
            assert 0 < start < 16 and completion.finish_reason == "length"
            after = base_logprobs(model, completion, pair)[start:]
            assert completion.diagnostics.base_logprobs[start:] != pytest.approx(after, abs=1e-3)

        ended = update_midway(pair, lambda: pair.update_base(named(model).items(), running="abort"))
        assert {c.finish_reason for c in ended} == {"abort"}
        assert all(0 < len(c.token_ids) < 16 for c in ended)


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_leave_everything_as_it_is(
    case: str, tmp_path: Path, pair: Pair
) -> None:
    make, message = REFUSED[case]
    weights = make(tmp_path)
    expected = pair.generate(QUESTIONS[:3], PARAMS, chat=True)
    with opened(speculation="off") as updated:

        def update() -> None:
            with pytest.raises(WeightMismatch, match=message):
                updated.update_base(weights)

        for one, other in zip(update_midway(updated, update, 3), expected, strict=True):
            assert one.token_ids == other.token_ids and not one.weight_versions


def test_a_tied_head_may_come_or_not() -> None:
    model = trained(1)
    head = {"lm_head.weight": model.lm_head.weight.detach()}
    with opened() as pair:
        pair.update_base(named(model).items())
        expected = pair.generate(QUESTIONS[:2], PARAMS)
        pair.update_base({**head, **named(model)}.items())
        for one, other in zip(pair.generate(QUESTIONS[:2], PARAMS), expected, strict=True):
            assert one.diagnostics.logprobs == pytest.approx(other.diagnostics.logprobs, abs=1e-4)


def test_the_teacher_stays_where_both_came_from_one_folder() -> None:
    with opened(BASE, BASE) as pair:
        pair.update_base(named(trained(1)).items())
        (completion,) = pair.generate(QUESTIONS[:1], PARAMS)
        with opened(trained(1), BASE) as fresh:
            (expected,) = fresh.generate(QUESTIONS[:1], PARAMS)
        assert completion.diagnostics.logprobs == pytest.approx(
            expected.diagnostics.logprobs, abs=1e-4
        )


def test_a_shared_module_says_that_it_has_changed() -> None:
    model = trained(0, 0.0)
    with opened(model, speculation="off") as pair:
        new = named(trained(1, 0.03))

        def update() -> None:
            pair.pause()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(new[name])
            pair.update_base(version=7)
            pair.resume()

        for completion in update_midway(pair, update, 3):
            ((version, start, end),) = completion.weight_versions
            assert version == 7 and 0 < start < end == 16
            after = base_logprobs(model, completion, pair)
            assert completion.diagnostics.base_logprobs[start:] == pytest.approx(
                after[start:], abs=1e-4
            )

    with opened() as pair, pytest.raises(InvalidRequest, match="No weights are given"):
        pair.update_base()
    with opened(model, model) as pair, pytest.raises(InvalidRequest, match="share their weights"):
        pair.update_base()


def test_pause_and_resume() -> None:
    with opened(max_num_seqs=2) as pair:
        pair.pause()
        batch = pair.start(pair.prepare(QUESTIONS[:3], PARAMS, READING))
        assert batch.poll(0.2) is None
        pair.resume()
        assert [c.finish_reason for c in batch] == ["length"] * 3

        batch = pair.start(pair.prepare(QUESTIONS[:3], PARAMS, READING))
        pair.pause("wait")
        later = pair.start(pair.prepare(QUESTIONS[:1], PARAMS, READING))
        assert [c.finish_reason for c in batch] == ["length"] * 3
        assert later.poll(0.1) is None
        pair.update_base(named(trained(1)).items())
        pair.resume()
        assert [c.weight_versions for c in later] == [[(1, 0, 16)]]

        batch = pair.start(pair.prepare(QUESTIONS[:3], PARAMS, READING))
        pair.pause("abort")
        later = pair.start(pair.prepare(QUESTIONS[:1], PARAMS, READING))
        assert [c.finish_reason for c in batch] == ["abort"] * 3
        later.abort()
        assert [c.finish_reason for c in later] == ["abort"]
        pair.resume()
        pair.resume()
        assert pair.generate(QUESTIONS[:1], PARAMS)[0].finish_reason == "length"
    with pytest.raises(EngineFailure):
        pair.pause()


def test_two_hundred_updates_leak_nothing() -> None:
    weights = named(trained(1))
    with opened() as pair:
        batch = pair.start(pair.prepare(QUESTIONS[:2], LONG, READING))
        sizes = []
        for n in range(220):
            pair.update_base(weights.items(), running=("recompute", "keep")[n % 2])
            sizes.append(resident_mb())
        batch.stop()
        assert pair.base_version == 220
        assert max(sizes[20:]) - sizes[20] < 40  # the weights alone are 11
