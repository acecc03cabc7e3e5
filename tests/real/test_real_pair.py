"""The real Qwen2.5-Coder pair; run with MIDLOGIT_MODELS=FOLDER pytest -m real_models (speed: benchmarks/local.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.local import BASE_SYSTEM, PROMPTS
from midlogit import Pair, SamplingParams
from midlogit.engines.draft_length import SpeculationOption
from tests.ties import require_equal_up_to_ties

pytestmark = pytest.mark.real_models


def open_pair(speculation: SpeculationOption) -> Pair:
    folder = Path(os.environ["MIDLOGIT_MODELS"])
    models = folder / "qwen-0.5b", folder / "qwen-1.5b"
    return Pair.local(*models, dtype="float32", device="cpu", speculation=speculation)


@pytest.fixture(scope="module")
def real() -> Iterator[Pair]:
    with open_pair("off") as opened:
        yield opened


@pytest.fixture(scope="module")
def drafting() -> Iterator[Pair]:
    with open_pair(4) as opened:
        yield opened


def test_alpha_and_kl_lie_where_they_were_measured(real: Pair) -> None:
    """12 chat prompts of 64 tokens over the full vocabulary, with a system prompt for the base alone."""
    teacher_prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    base_prompts = [
        [{"role": "system", "content": BASE_SYSTEM}, *messages] for messages in teacher_prompts
    ]
    params = SamplingParams.preset("exploratory", max_tokens=64, seed=1, ignore_eos=True)
    found = real.generate(base_prompts=base_prompts, teacher_prompts=teacher_prompts, params=params)
    alphas = [a for c in found for a in c.diagnostics.alpha]
    kls = [kl for c in found for kl in c.diagnostics.kl_base]
    gaps = [
        abs(a - b)
        for c in found
        for a, b in zip(c.diagnostics.kl_base, c.diagnostics.kl_teacher, strict=True)
    ]
    print(f"α {fmean(alphas):.3f}, KL {fmean(kls):.3f} nats, largest gap {max(gaps):.1e}")
    assert len(alphas) == 12 * 64
    assert 0.40 <= fmean(alphas) <= 0.56
    assert 0.05 <= fmean(kls) <= 0.30
    assert max(gaps) <= 1e-5


def test_greedy_drafts_give_the_text_of_lock_step(real: Pair, drafting: Pair) -> None:
    """As far as the two largest values of q* differ by more than rounding does."""
    asked = SamplingParams.preset("exploratory", temperature=0, max_tokens=48, top_logprobs=2)
    found, expected = (pair.generate(PROMPTS, asked, chat=True) for pair in (drafting, real))
    assert require_equal_up_to_ties(found, expected) > 12 * 30


@pytest.mark.parametrize(("preset", "least"), [("exploratory", 0.85), ("balanced", 0.81)])
def test_most_drafts_stand(drafting: Pair, preset: str, least: float) -> None:
    """12 chat prompts of 64 tokens; four samples of each, since the share of one differs by 0.014 from seed to seed.

    What the base drafts outside the teacher's nucleus cannot stand, so fewer do than on the whole vocabulary.
    """
    before = drafting.statistics()["speculation"]
    drafting.generate(
        PROMPTS,
        SamplingParams.preset(preset, max_tokens=64, seed=1, n=4, ignore_eos=True),
        chat=True,
    )
    after = drafting.statistics()["speculation"]
    accepted, checked = (after[key] - before[key] for key in ("accepted", "checked"))
    print(f"{preset}: acceptance {accepted / checked:.3f} of {checked} drafts")
    assert accepted / checked >= least
