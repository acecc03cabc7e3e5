"""The real Qwen2.5-Coder pair; run with MIDLOGIT_MODELS=FOLDER pytest -m real_models (speed: benchmarks/local.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.local import BASE_SYSTEM, PROMPTS
from midlogit import Pair, SamplingParams

pytestmark = pytest.mark.real_models


@pytest.fixture(scope="module")
def real() -> Iterator[Pair]:
    folder = Path(os.environ["MIDLOGIT_MODELS"])
    with Pair.local(folder / "qwen-0.5b", folder / "qwen-1.5b", dtype="float32", device="cpu") as opened:
        yield opened


def test_alpha_and_kl_lie_where_they_were_measured(real: Pair) -> None:
    """12 chat prompts of 64 tokens over the full vocabulary, with a system prompt for the base alone."""
    teacher_prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    base_prompts = [[{"role": "system", "content": BASE_SYSTEM}, *messages] for messages in teacher_prompts]
    params = SamplingParams.preset("exploratory", max_tokens=64, seed=1, ignore_eos=True)
    found = real.generate(base_prompts=base_prompts, teacher_prompts=teacher_prompts, params=params)
    alphas = [a for c in found for a in c.diagnostics.alpha]
    kls = [kl for c in found for kl in c.diagnostics.kl_base]
    gaps = [abs(a - b) for c in found for a, b in zip(c.diagnostics.kl_base, c.diagnostics.kl_teacher, strict=True)]
    print(f"α {fmean(alphas):.3f}, KL {fmean(kls):.3f} nats, largest gap {max(gaps):.1e}")
    assert len(alphas) == 12 * 64
    assert 0.40 <= fmean(alphas) <= 0.56
    assert 0.05 <= fmean(kls) <= 0.30
    assert max(gaps) <= 1e-5
