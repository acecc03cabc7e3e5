"""What the bundled pair must be: two models that differ enough, end by themselves, and stay small."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from midlogit import Pair, SamplingParams
from midlogit.core.mixture import normalise
from midlogit.core.outcomes import Outcomes
from midlogit.models.weights import weight_count
from tests.conftest import BASE, TEACHER
from training.corpus import load

PROMPTS = 200


@pytest.fixture(scope="module")
def held_out() -> list:
    """Clean held-out questions and story requests, both kinds as often."""
    examples = [e for e in load()[1] if e.clean]
    questions = [e for e in examples if e.kind == "question"]
    stories = [e for e in examples if e.kind == "story"]
    return [e for two in zip(questions, stories, strict=False) for e in two][:PROMPTS]


@pytest.fixture(scope="module")
def scored(pair: Pair, models, held_out) -> dict[str, list[float]]:
    """KL(teacher‖base) at each token of held-out answers, and each model's log-probability of the token.

    The base sees the plain form, the teacher its chat template, and both the same answer.
    """
    mixing = pair.mixing
    outcomes = Outcomes(tuple(sorted(mixing.special_ids)), mixing.stop_ids)
    found: dict[str, list[float]] = {"kl": [], "base": [], "teacher": []}
    for example in held_out[:100]:
        message = [{"role": "user", "content": example.request}]
        answer = [*mixing.base.encode(" " + example.answer), mixing.stop_ids[0]]
        rows = []
        for model, prompt in zip(
            models,
            (mixing.base.encode_chat(message), mixing.teacher.encode_chat(message)),
            strict=True,
        ):
            with torch.inference_mode():
                logits = (
                    model(torch.tensor([prompt + answer[:-1]]))
                    .logits[0, len(prompt) - 1 :]
                    .double()
                )
            may_end = torch.ones(len(answer), dtype=torch.bool)
            rows.append(normalise(outcomes.apply(logits, may_end, logits.shape[-1])))
        base, teacher = rows
        kl = torch.where(teacher > -torch.inf, teacher.exp() * (teacher - base), 0.0).nansum(-1)
        found["kl"] += kl.tolist()
        drawn = torch.tensor(answer)[:, None]
        found["base"] += base.gather(1, drawn)[:, 0].tolist()
        found["teacher"] += teacher.gather(1, drawn)[:, 0].tolist()
    return found


def test_the_models_differ_but_not_too_much(scored) -> None:
    assert 0.2 <= np.mean(scored["kl"]) <= 1.0


def test_the_teacher_is_better_at_answers(scored) -> None:
    base, teacher = (math.exp(-np.mean(scored[side])) for side in ("base", "teacher"))
    assert teacher <= 0.85 * base


def share_ending(pair: Pair, requests: list[str], params: SamplingParams) -> float:
    found = pair.generate(requests, params, chat=True)
    return sum(c.finish_reason == "stop" for c in found) / len(found)


def test_sequences_end_by_themselves(pair: Pair, held_out) -> None:
    params = SamplingParams.preset("balanced", seed=3, max_tokens=300)
    assert share_ending(pair, [e.request for e in held_out], params) >= 0.8


def test_without_merged_stops_far_fewer_end(pair: Pair, held_out) -> None:
    """Questions, which take some 15 tokens, on the whole vocabulary: no nucleus of one stop id ends a sequence."""
    questions = [e.request for e in held_out if e.kind == "question"][:60]
    merged, apart = (
        share_ending(
            pair,
            questions,
            SamplingParams.preset("exploratory", seed=3, max_tokens=64, merge_stop_ids=on),
        )
        for on in (True, False)
    )
    assert merged >= 0.9
    assert apart <= 0.4


def test_the_two_folders_are_small_and_end_differently(pair: Pair) -> None:
    files = [file for folder in (BASE, TEACHER) for file in Path(folder).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    assert any(file.suffix == ".safetensors" for file in files)
    assert pair.mixing.base.stop_ids != pair.mixing.teacher.stop_ids
    assert len(pair.mixing.stop_ids) == 2
    assert pair.mixing.teacher.has_chat_template and not pair.mixing.base.has_chat_template
    assert weight_count(pair.mixing.teacher) > 2 * weight_count(pair.mixing.base)
    assert 4096 <= pair.mixing.alignment.size <= 8192 and not pair.mixing.alignment.differing
