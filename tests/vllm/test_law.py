"""Lock-step and drafts on vLLM give sequences of one law."""

from __future__ import annotations

from tests.law import continuations, same_law_ps
from tests.vllm.conftest import open_pair


def test_lock_step_and_drafts_have_one_law() -> None:
    """5,000 sampled continuations, half of them drafted ahead, at different seeds."""
    runs = 2500
    samples = []
    for speculation, seed in (("off", 3), (3, 4)):
        with open_pair(speculation=speculation, max_num_seqs=250, max_num_batched_tokens=2048) as pair:
            samples.append(continuations(pair, seed, runs))
            if speculation != "off":
                assert pair.statistics()["speculation"]["accepted"] > 3 * runs
    assert min(same_law_ps(*samples).values()) > 0.001
