"""What model runner V2 keeps on the device; the tests beside this one run on it too (make test-vllm-v2)."""

from __future__ import annotations

import os

import pytest

from midlogit import Pair, SamplingParams
from midlogit.engines.vllm.observer import StepRecord
from midlogit.engines.vllm.options import V2
from tests.questions import QUESTIONS
from tests.vllm.conftest import engine_of, open_pair

pytestmark = pytest.mark.skipif(os.environ.get(V2) != "1", reason="this is model runner V1")


def test_rejected_drafts_do_not_count_in_the_lengths_on_the_device() -> None:
    """vLLM writes a sampled token at that length: beyond the request's own it would be in another's memory."""
    with open_pair(speculation=3) as pair:
        beyond = run_and_measure(pair)
        rounds, accepted = (
            pair.statistics()["speculation"][name] for name in ("rounds", "accepted")
        )
    assert 3 * rounds > accepted + 10  # drafts were rejected
    assert max(beyond) <= 0


def run_and_measure(pair: Pair) -> list[int]:
    """How many tokens the base's requests have more on the device than to the scheduler, at the end of each step."""
    engine = engine_of(pair)
    core = engine.cores[0]
    states, requests = core._runner._runner.req_states, core._scheduler.requests
    beyond = []

    def measure(record: StepRecord) -> None:
        for key, index in states.req_id_to_index.items():
            if key in requests:
                request = requests[key]
                known = request.num_tokens + request.num_output_placeholders
                beyond.append(int(states.total_len.gpu[index]) - known)

    engine.lockstep.observer = measure
    pair.generate(QUESTIONS[:3], SamplingParams(seed=1, max_tokens=40, ignore_eos=True))
    engine.lockstep.observer = None
    return beyond
