"""lm-evaluation-harness as a client of `serve --engine vllm`: its numbers are the scores of the local engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from midlogit import Pair, SamplingParams
from tests.harness import ROWS, evaluate, write_tasks
from tests.http.servers import install
from tests.server.conftest import process

OPTIONS = "--engine vllm --dtype float32 --enforce-eager --max-model-len 256 --preset exploratory"
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
END = "<|end|>"  # the teacher's last token, by which the harness begins a text that has no context


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All tasks, with two requests of two texts each under way."""
    manager = write_tasks(tmp_path_factory.mktemp("tasks"))
    with process(*OPTIONS.split(), python=install(), **ENVIRONMENT) as (_, http):
        return evaluate(
            manager,
            "local-completions",
            "local_choice",
            "local_last",
            "local_rolling",
            model_args={"base_url": f"{http.base_url}/v1/completions", "num_concurrent": 2},
            batch_size=2,
        )


def score(pair: Pair, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """log q of each text after its context, and whether all of its tokens are the most likely ones."""
    encode = pair.mixing.teacher.encode
    params = SamplingParams.preset("exploratory", temperature=0, top_logprobs=1)
    found = []
    wholes = [encode(context + text) for context, text in texts]
    for (context, _), ids, scores in zip(texts, wholes, pair.score(wholes, params), strict=True):
        count = len(ids) - len(encode(context))
        assert scores.top is not None
        most_likely = [top.q[0][0] for top in scores.top[-count:]]
        loglikelihood = sum(scores.diagnostics.logprobs[-count:])
        found.append((loglikelihood, ids[-count:] == most_likely))
    return found


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
