"""Scores of given text on vLLM, among requests that are generated: those of the local engine."""

from __future__ import annotations

import pytest

from midlogit import Pair, SamplingParams
from midlogit.requests.prompts import Reading
from tests.vllm.conftest import open_pair, require_empty

TEXTS = ["Once upon a time there was a fox who lived in the forest.", "Hi there", "The dog"]
PARAMS = SamplingParams.preset("exploratory", temperature=0.8, top_logprobs=3)


@pytest.mark.parametrize("speculation", ["off", 3])
def test_scores_are_those_of_the_local_engine(pair: Pair, speculation: str | int) -> None:
    expected = pair.score(TEXTS, PARAMS)
    with open_pair(max_num_seqs=4, speculation=speculation) as served:
        batch = served.start(served.prepare(["Once"] * 6, PARAMS, Reading()))
        found = served.score(TEXTS, PARAMS)
        assert sum(1 for _ in batch) == 6
        assert served.score([[5]], PARAMS)[0].diagnostics.logprobs == []
        require_empty(served)

    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.first, ours.error) == (theirs.token_ids, theirs.first, None)
        for name in ("logprobs", "alpha", "base_tempered_logprobs", "teacher_tempered_logprobs"):
            one, other = (getattr(scores.diagnostics, name) for scores in (ours, theirs))
            assert one == pytest.approx(other, abs=1e-4), name
        assert ours.top is not None and theirs.top is not None
        assert [[i for i, _ in top.q] for top in ours.top] == [
            [i for i, _ in top.q] for top in theirs.top
        ]
