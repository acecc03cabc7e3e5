"""Two jobs of the bundled pair and a file of lines, run once for the tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from midlogit import Pair, SamplingParams
from tests.jobs.small_jobs import TOO_LONG, run

PROMPTS = [f"A story about a {who}:" for who in ("fox", "bear", "cat", "boat", "king")]
N, TOKENS = 3, 24


@pytest.fixture(scope="session")
def runs(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two complete jobs of the same rows and seed, of different presets, with a row that ends as errors."""
    folder = tmp_path_factory.mktemp("reports")
    prompts = [*PROMPTS, TOO_LONG]
    for preset in ("balanced", "exploratory"):
        params = SamplingParams.preset(
            preset, n=N, seed=5, max_tokens=TOKENS, temperature=0.9, top_logprobs=4
        )
        run(pair, folder / preset, prompts, params=params)
    return folder / "balanced" / "RUN", folder / "exploratory" / "RUN"
