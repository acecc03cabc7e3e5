"""The alphabet of a request: shared by those that ask for the same, by any number of threads; whose stop id ends it."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from midlogit import InvalidRequest, Pair, SamplingParams
from midlogit.models.mixing import KEPT_OUTCOMES, Mixing


def test_threads_that_ask_for_ever_new_alphabets(pair: Pair) -> None:
    mixing = Mixing(pair.mixing.base, pair.mixing.teacher)
    asked = [SamplingParams(stop_token_ids=(i,)) for i in range(100, 100 + 2 * KEPT_OUTCOMES)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(mixing.outcomes, asked * 3))
    for params, outcomes in zip(asked * 3, found, strict=True):
        assert outcomes.stop_token_ids == params.stop_token_ids
    assert mixing.outcomes(asked[0]) is mixing.outcomes(replace(asked[0], temperature=0.5))


def test_whose_stop_id(pair: Pair) -> None:
    mixing = pair.mixing
    for stop_id in ("teacher", "base"):
        outcomes = mixing.outcomes(SamplingParams(stop_id=stop_id))
        assert outcomes.draws_stop_id == (stop_id == "base")
        assert outcomes.stop_ids == mixing.stop_ids

    tokenizer = copy.copy(mixing.base.tokenizer)
    tokenizer.eos_token = None
    endless = replace(mixing.base, tokenizer=tokenizer, generation_stop_ids=())
    alone = Mixing(endless, mixing.teacher)
    with pytest.raises(InvalidRequest, match=r"generation_config\.json"):
        alone.outcomes(SamplingParams.preset("rollout"))
    alone.outcomes(SamplingParams.preset("rollout", ignore_eos=True))
    alone.outcomes(SamplingParams.preset("rollout", stop_id="teacher"))
