"""Tokens of the vLLM engine follow q*: single tokens by chi-square, whole texts in lock-step and drafted."""

from __future__ import annotations

import numpy as np
import torch

from midlogit import Pair, SamplingParams
from midlogit.core import reference
from tests.law import chi_square_p, continuations, same_law_ps
from tests.questions import QUESTIONS
from tests.vllm.conftest import open_pair


def open_wide(speculation: int | str) -> Pair:
    return open_pair(speculation=speculation, max_num_seqs=250, max_num_batched_tokens=4096)


@torch.inference_mode()
def test_the_draw_is_exact(models) -> None:
    """Chi-square of 10,000 first tokens against the float64 reference on whole rows; the first token is never drafted.

    The prompts are longer than a block of the cache, so that most of each is read once.
    """
    asked = SamplingParams.preset("exploratory", max_tokens=1, seed=13, n=5_000)
    with open_wide("off") as pair:
        stop_ids = pair.mixing.stop_ids
        for prompt in (" ".join(QUESTIONS[:5]), " ".join(QUESTIONS[6:10])):
            drawn = [c.token_ids[0] for c in pair.generate([prompt], asked)]
            base, teacher = (
                model(torch.tensor([side.encode(prompt)])).logits[0, -1].double().tolist()
                for model, side in zip(models, (pair.mixing.base, pair.mixing.teacher), strict=True)
            )
            q = np.array(
                reference.mixture(
                    base, teacher, masked_ids=pair.mixing.special_ids, stop_ids=stop_ids
                ).q
            )
            outcomes = [stop_ids[0] if token in stop_ids else token for token in drawn]
            assert (q * len(drawn) >= 8).sum() >= 10
            assert chi_square_p(outcomes, q) > 1e-3


def test_lock_step_and_drafts_have_one_law() -> None:
    """2,500 sampled continuations, half of them drafted ahead, at different seeds."""
    runs = 1250
    samples = []
    for speculation, seed in (("off", 3), (3, 4)):
        with open_wide(speculation) as pair:
            samples.append(continuations(pair, seed, runs))
            if speculation != "off":
                assert pair.statistics()["speculation"]["accepted"] > 3 * runs
    assert min(same_law_ps(*samples).values()) > 0.001
