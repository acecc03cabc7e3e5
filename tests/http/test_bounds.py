"""Top-20 lists of real servers against their whole rows: the certificates hold.

MIDLOGIT_POSITIONS=2000 takes as many rows as docs/http.md tells of.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
import torch

from midlogit import Pair, SamplingParams
from midlogit.decide.arrays import decide
from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.lists import TopLogprobs, unlisted_ids
from midlogit.decide.truncated.rows import decide_truncated
from midlogit.outputs import Decision
from tests.http.conftest import WHOLE
from tests.rows import row_settings

POSITIONS = int(os.environ.get("MIDLOGIT_POSITIONS", "400"))
PROMPTS = [
    "Once upon a time",
    "The little boy",
    "Why is the sky",
    "a dog and a cat",
    "One day, a girl named",
] * math.ceil(POSITIONS / 200)


@pytest.fixture(scope="module")
def rows(
    pair: Pair, models: tuple[torch.nn.Module, torch.nn.Module]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of both bundled models along texts of their own mixture."""
    params = SamplingParams.preset("exploratory", max_tokens=40, seed=5, ignore_eos=True)
    completions = pair.generate(PROMPTS, params, progress=False)
    encode = pair.mixing.teacher.encode
    found: list[list[np.ndarray]] = [[], []]
    for completion in completions:
        prompt = encode(completion.prompt)
        ids = torch.tensor([prompt + completion.token_ids[:-1]])
        for model, side in zip(models, found, strict=True):
            with torch.inference_mode():
                logits = model(ids).logits[0, len(prompt) - 1 :].double()
            side.append(torch.log_softmax(logits, dim=-1).numpy())
    base, teacher = (np.concatenate(side)[:POSITIONS] for side in found)
    assert len(base) == POSITIONS
    return base, teacher


def listed(row: np.ndarray) -> TopLogprobs:
    order = np.argsort(-row, kind="stable")[:20]
    return TopLogprobs(
        {int(i): float(np.float32(row[i])) for i in order}, float(np.float32(row[order[-1]])), WHOLE
    )


def cut(
    base: np.ndarray, teacher: np.ndarray, settings: RowSettings, score: bool
) -> tuple[TopLogprobs, TopLogprobs]:
    lists = [listed(base), listed(teacher)]
    if score:
        for at, (ids, row) in enumerate(
            zip(unlisted_ids(*lists, settings, WHOLE), (base, teacher), strict=True)
        ):
            lists[at] = replace(
                lists[at], logprobs=lists[at].logprobs | {i: float(np.float32(row[i])) for i in ids}
            )
    return lists[0], lists[1]


def variation(one: Decision, other: Decision) -> float:
    a, b = ({i: math.exp(v) for i, v in d.top.q} for d in (one, other) if d.top)
    return 0.5 * sum(abs(a.get(i, 0) - b.get(i, 0)) for i in {*a, *b})


def assert_raw(
    decision: Decision, base: np.ndarray, teacher: np.ndarray, settings: RowSettings, score: bool
) -> None:
    """Both reported log-probabilities are the models' own, or marked as upper bounds where no server scores ids."""
    stops = settings.outcomes.merged_stops
    members = list(stops) if decision.token_id in stops else [decision.token_id]
    for row, logprob, bounded in (
        (base, decision.base_logprob, decision.base_bounded),
        (teacher, decision.teacher_logprob, decision.teacher_bounded),
    ):
        own = float(np.logaddexp.reduce(row[members]))
        assert logprob >= own - 1e-5 if bounded else abs(logprob - own) < 1e-5
        assert not (bounded and score)


@pytest.mark.parametrize("preset", ["exploratory", "balanced"])
@pytest.mark.parametrize("score", [False, True], ids=["bounded", "scored"])
def test_bounds_hold_and_say_something(
    pair: Pair, rows: tuple[np.ndarray, np.ndarray], preset: str, score: bool
) -> None:
    params = SamplingParams.preset(preset)
    settings = row_settings(
        rule=params.alpha_rule,
        outcomes=pair.mixing.outcomes(params),
        top_p=params.target_top_p if params.constraint_to_target else None,
        alpha_tol=1e-9,
        top_logprobs=WHOLE,
    )
    errors: list[tuple[float, float, float, float]] = []
    for at in range(0, POSITIONS, 250):
        base, teacher = (row[at : at + 250] for row in rows)
        alike: Sequence[RowSettings] = [settings] * len(base)
        exact = decide(base, teacher, alike)
        ours = decide_truncated(
            [cut(p, t, settings, score) for p, t in zip(base, teacher, strict=True)], alike, WHOLE
        )
        for e, c, p, t in zip(exact, ours, base, teacher, strict=True):
            assert_raw(c, p, t, settings, score)
            errors.append((abs(e.alpha - c.alpha), c.alpha_bound, variation(e, c), c.tv_bound))
            assert abs(e.alpha - c.alpha) <= c.alpha_bound + 1e-6
            assert variation(e, c) <= c.tv_bound + 1e-6
    medians = [median(column) for column in zip(*errors, strict=True)]
    alpha, alpha_bound, distance, bound = medians
    kind = "scored" if score else "bounded"
    print(f"\n{preset}, {kind}: median |α error| {alpha:.2g}, bound {alpha_bound:.2g}; ", end="")
    print(f"median variation {distance:.2g}, bound {bound:.2g}")
    assert medians[3] < 0.8
    if score and preset == "exploratory":
        assert medians[1] < 0.4 and medians[3] < 0.4
