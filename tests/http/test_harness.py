"""lm-evaluation-harness as a client of `serve --engine vllm`: its numbers are the scores of the local engine."""

from __future__ import annotations

from typing import Any

import pytest

from midlogit import Pair
from tests.harness import ROWS, evaluate, score, write_tasks
from tests.http.servers import install
from tests.server.conftest import process
from tests.vllm_environment import SETTINGS

OPTIONS = "--engine vllm --dtype float32 --enforce-eager --max-model-len 256 --preset exploratory"
END = "<|end|>"  # the teacher's last token, by which the harness begins a text that has no context


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All tasks, with two requests of two texts each under way."""
    manager = write_tasks(tmp_path_factory.mktemp("tasks"))
    with process(*OPTIONS.split(), python=install(), **SETTINGS) as (_, http):
        return evaluate(
            manager,
            "local-completions",
            "local_choice",
            "local_last",
            "local_rolling",
            model_args={"base_url": f"{http.base_url}/v1/completions", "num_concurrent": 2},
            batch_size=2,
        )


@pytest.mark.parametrize("task", ["local_choice", "local_last"])
def test_loglikelihoods_are_scores_of_the_local_engine(
    pair: Pair, results: dict[str, Any], task: str
) -> None:
    samples = results["samples"][task]
    asked = [arguments for sample in samples for arguments in sample["arguments"]]
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    assert len(asked) == (len(ROWS) if task == "local_last" else 3 * len(ROWS))
    for answer, expected in zip(answers, score(pair, asked), strict=True):
        assert answer == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert {greedy for _, greedy in answers} == {True, False}


def test_whole_texts_are_scored_after_the_teachers_last_token(
    pair: Pair, results: dict[str, Any]
) -> None:
    samples = results["samples"]["local_rolling"]
    asked = [(END, text) for sample in samples for (text,) in sample["arguments"]]
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    assert answers == pytest.approx([found for found, _ in score(pair, asked)], abs=1e-4)
