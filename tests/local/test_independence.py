"""Rows of one seed are independent draws: 64 prompts of a call count as 64, repeated prompts included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from midlogit import InvalidRequest, Pair, SamplingParams
from midlogit.core import reference

NAMES = """
Tom Sue Ben Mia Tim Ann Max Lily Sam Amy Jack Lucy Bob Anna Leo Emma Dan Jane Joe Ella Kim Rose Pat Zoe Ray Eva
Jim Ivy Ken Ada Roy May Ned Fay Lee Joy Abe Bea Cal Dot Eli Flo Gus Hal Ike Jan Kay Lou
"""
PROMPTS = [f"{name} had a" for name in NAMES.split()]
DIFFERENT = len(PROMPTS)
PROMPTS += ["One day the"] * 16
DATA_SETS = 40
TOKENS = 2


@pytest.fixture(scope="module")
def data_sets() -> list[list]:
    """The completions of each data set, which is one call with a seed of its own."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    with Pair.local(
        dtype="float32", device="cpu", max_num_seqs=len(PROMPTS), speculation="off"
    ) as pair:
        return [
            pair.generate(PROMPTS, replace(params, seed=1000 + k), progress=False)
            for k in range(DATA_SETS)
        ]


def mean_correlation(values_DP: np.ndarray) -> float:
    """The mean correlation of two prompts over the data sets."""
    centred_DP = values_DP - values_DP.mean(0)
    scaled_DP = centred_DP / np.maximum(centred_DP.std(0), 1e-12)
    prompts = values_DP.shape[1]
    return (scaled_DP.sum(1).var() - prompts) / (prompts * (prompts - 1))


def variance_ratio(values_DP: np.ndarray) -> float:
    """Variance of a data set's mean over that of as many independent rows."""
    return values_DP.mean(1).var(ddof=1) / (values_DP.var(0, ddof=1).mean() / values_DP.shape[1])


@torch.inference_mode()
def first_distributions(pair: Pair, models) -> np.ndarray:
    """The exact distribution of the first token of each prompt [P, V], by plain transformers."""
    outcomes = pair.mixing.outcomes(SamplingParams(ignore_eos=True))
    found = {}
    for prompt in dict.fromkeys(PROMPTS):
        ids = torch.tensor([pair.mixing.teacher.encode(prompt)])
        base, teacher = (model(ids).logits[0, -1].tolist() for model in models)
        found[prompt] = reference.mixture(
            base, teacher, masked_ids=outcomes.masked_ids, top_p=0.95, forced=True
        ).q
    return np.array([found[prompt] for prompt in PROMPTS])


def test_the_place_of_a_token_in_its_distribution_is_independent_across_prompts(
    pair, models, data_sets
) -> None:
    q_PV = first_distributions(pair, models)
    until_PV = np.cumsum(q_PV, axis=1) - q_PV / 2
    drawn_DP = np.array([[completion.token_ids[0] for completion in rows] for rows in data_sets])
    place_DP = until_PV[np.arange(len(PROMPTS)), drawn_DP]
    for some in (slice(None), slice(0, DIFFERENT), slice(DIFFERENT, None)):
        count = place_DP[:, some].shape[1]
        # Of independent prompts it lies within a few standard deviations of zero, sqrt(2 / data sets) / prompts each.
        assert abs(mean_correlation(place_DP[:, some])) < 4 * (2 / DATA_SETS) ** 0.5 / count


def test_a_data_set_varies_as_much_as_independent_rows(data_sets) -> None:
    logprobs_DPT = np.array(
        [[completion.diagnostics.logprobs for completion in rows] for rows in data_sets]
    )
    for values_DP in (logprobs_DPT.mean(-1), logprobs_DPT[..., 0]):
        assert 0.6 < variance_ratio(values_DP) < 1.6
        assert 0.6 < variance_ratio(values_DP[:, DIFFERENT:]) < 1.6  # equal prompts alone


def test_equal_prompts_of_a_call_are_different_samples(pair: Pair) -> None:
    params = SamplingParams(max_tokens=8, seed=7)
    repeated = pair.generate(["Once upon a time"] * 8, params, progress=False)
    samples = pair.generate(["Once upon a time"], replace(params, n=8), progress=False)
    assert len({tuple(completion.token_ids) for completion in repeated}) == 8
    assert [c.token_ids for c in repeated] == [c.token_ids for c in samples]


def test_a_request_draws_the_same_alone_and_in_any_call(pair: Pair) -> None:
    params = SamplingParams(max_tokens=8, seed=7, n=2)
    base = ["A dog", "A fox", "A cat"]
    together = pair.generate(
        base_prompts=base, teacher_prompts=["A hen"] * 3, params=params, progress=False
    )
    assert len({tuple(completion.token_ids) for completion in together}) == 6
    for number, prompt in enumerate(base):
        alone = pair.generate(
            base_prompts=[prompt], teacher_prompts=["A hen"], params=params, progress=False
        )
        assert [c.token_ids for c in alone] == [
            c.token_ids for c in together[2 * number : 2 * number + 2]
        ]


def test_named_requests_draw_by_their_name(pair: Pair) -> None:
    params = SamplingParams(max_tokens=8, seed=7)
    rows = {f"row-{n}": "Once upon a time" for n in range(6)}
    whole = pair.generate([*rows.values()], params, request_ids=[*rows], progress=False)
    drawn = dict(zip(rows, (completion.token_ids for completion in whole), strict=True))
    assert len(set(map(tuple, drawn.values()))) == 6
    rest = ["row-4", "row-1"]  # a later call for some of the rows, in another order
    again = pair.generate([rows[name] for name in rest], params, request_ids=rest, progress=False)
    assert [completion.token_ids for completion in again] == [drawn[name] for name in rest]


@pytest.mark.parametrize(
    ("request_ids", "message"),
    [
        (["a"], "differ in number"),
        (["a", "a"], "holds 'a' 2 times"),
        ([1, 2], "is no text"),
        ("ab", "differ in number"),
    ],
)
def test_bad_request_ids_are_refused(pair: Pair, request_ids, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pair.generate(["A dog", "A fox"], request_ids=request_ids)
