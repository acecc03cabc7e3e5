"""Rollouts of the local engine: what trainers of the base are told, and how seeds tell samples apart."""

from __future__ import annotations

import math

import pytest

from midlogit import EngineFailure, InvalidRequest, KLBudget, Pair, SamplingParams
from tests.questions import QUESTIONS
from tests.records import assert_recomputed, mean_ratio


def rollout_params(**changes) -> SamplingParams:
    return SamplingParams.preset("rollout", **{"max_tokens": 24, "seed": 1, **changes})


def test_the_preset() -> None:
    params = rollout_params()
    assert (params.stop_id, params.force_first_token, params.constraint_to_target) == (
        "base", False, False,
    )  # fmt: skip
    assert not params.exclude_special_tokens
    assert params.alpha_rule == KLBudget(0.25 / 24)
    assert rollout_params(max_tokens=4).alpha_rule == KLBudget(0.02)
    assert rollout_params(max_tokens=2048, alpha_rule=KLBudget(0.1)).alpha_rule == KLBudget(0.1)
    for wrong in ({"stop_id": "mine"}, {"return_support": True}):
        with pytest.raises(InvalidRequest):
            rollout_params(**wrong)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("speculation", ["off", 3])
def test_log_probabilities_are_those_of_a_trainer(
    pair: Pair, models, temperature: float, speculation
) -> None:
    asked = rollout_params(temperature=temperature, n=2)
    with Pair.local(dtype="float32", device="cpu", speculation=speculation) as opened:
        done = opened.generate(QUESTIONS[:4], asked, chat=True)
    rollouts = [completion.rollout() for completion in done]
    for completion, rollout in zip(done, rollouts, strict=True):
        assert_recomputed(rollout, models, temperature)
        mixing = pair.mixing
        message = [{"role": "user", "content": completion.prompt}]
        assert rollout.prompt_token_ids == mixing.base.encode_chat(message)
        assert rollout.teacher_prompt_token_ids == mixing.teacher.encode_chat(message)
        assert rollout.token_ids == completion.token_ids and rollout.weight_versions == []
        assert max(map(abs, rollout.base_support_logmass)) < 1e-6
        assert max(rollout.kl_base) <= 0.25 / 24 + 1e-6
        if completion.finish_reason == "stop":
            assert rollout.token_ids[-1] in mixing.base.stop_ids
    assert 0.9 < mean_ratio(rollouts) < 1.1


def test_a_kept_nucleus_comes_with_its_support(pair: Pair, models) -> None:
    asked = SamplingParams(max_tokens=12, seed=2, stop_id="base", return_support=True)
    for completion in pair.generate(QUESTIONS[:2], asked):
        rollout = completion.rollout()
        assert_recomputed(rollout, models, 1.0)
        assert len(rollout.support) == len(rollout.token_ids)
        for ids, token_id, mass in zip(
            rollout.support, rollout.token_ids, rollout.teacher_support_logmass, strict=True
        ):
            assert token_id in ids and 0.949 < math.exp(mass) <= 1
        assert completion.to_dict()["support"] == rollout.support
    (plain,) = pair.generate(QUESTIONS[:1], SamplingParams(max_tokens=2))
    assert plain.support is None and "support" not in plain.to_dict()


def test_samples_of_one_seed_differ_and_so_do_seeds(pair: Pair) -> None:
    """Repeated token-id prompts of one call, and the same prompts at another step's seed."""
    ids = pair.mixing.base.encode("Do lions live in caves?")
    seen = [
        completion.token_ids
        for seed in (1, 2)
        for completion in pair.generate([ids] * 4, rollout_params(seed=seed))
    ]
    assert len({*map(tuple, seen)}) == 8
    again = pair.generate([ids] * 4, rollout_params(seed=2))
    assert [completion.token_ids for completion in again] == seen[4:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_log_probabilities_of_the_draw(pair: Pair, temperature: float) -> None:
    """The same ids given as text: log q again, of ending ids too."""
    asked = rollout_params(temperature=temperature, n=2)
    done = [c.rollout() for c in pair.generate(QUESTIONS[:3], asked, chat=True)]
    scored = pair.score(
        base_prompts=[r.prompt_token_ids + r.token_ids for r in done],
        teacher_prompts=[r.teacher_prompt_token_ids + r.token_ids for r in done],
        params=asked,
    )
    assert any(r.finish_reason == "stop" for r in done)
    for rollout, scores in zip(done, scored, strict=True):
        count = len(rollout.token_ids)
        assert scores.diagnostics.logprobs[-count:] == pytest.approx(rollout.logprobs, abs=2e-5)
        base = scores.diagnostics.base_tempered_logprobs[-count:]
        assert base == pytest.approx(rollout.base_logprobs, abs=2e-5)


def test_no_rollout_of_an_error(pair: Pair) -> None:
    (completion,) = pair.generate(["What?"], rollout_params(max_tokens=1))
    for error_type, kind in (("engine", EngineFailure), ("request", InvalidRequest)):
        broken = type(completion)(
            **{name: getattr(completion, name) for name in completion.__slots__}
            | {"finish_reason": "error", "error": "It broke.", "error_type": error_type}
        )
        with pytest.raises(kind, match="It broke"):
            broken.rollout()
