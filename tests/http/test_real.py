"""A real pair behind two servers; skipped where it is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.local import PROMPTS
from midlogit import Pair, SamplingParams
from tests.http.conftest import Urls
from tests.http.servers import serving
from tests.ties import require_equal_up_to_ties

pytestmark = pytest.mark.real_models


@pytest.fixture
def real_urls() -> Iterator[Urls]:
    folder = Path(os.environ["MIDLOGIT_MODELS"])
    flags = ("--enforce-eager", "--max-model-len", "512")
    models = (folder / model for model in ("qwen-0.5b", "qwen-1.5b"))
    with serving(*models, flags=flags) as both:
        yield Urls(*both)


def test_greedy_drafts_of_a_real_pair_give_the_text_of_lock_step(real_urls: Urls) -> None:
    """Qwen2.5-Coder 0.5B and 1.5B, 4 chat prompts side by side."""
    asked = SamplingParams.preset("exploratory", temperature=0, max_tokens=24, top_logprobs=2)
    with (
        Pair.http(real_urls.base, real_urls.teacher, speculation=4) as drafting,
        Pair.http(real_urls.base, real_urls.teacher, speculation="off") as lockstep,
    ):
        found, expected = (
            pair.generate(PROMPTS[:4], asked, chat=True, progress=False)
            for pair in (drafting, lockstep)
        )
        assert drafting.statistics()["speculation"]["accepted"] > 4 * 10
    assert require_equal_up_to_ties(found, expected) > 4 * 15
