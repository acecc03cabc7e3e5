"""lm-evaluation-harness as a client: tasks made from local files, loglikelihoods against log q computed directly."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    import lm_eval.models.openai_completions
    from lm_eval.tasks import TaskManager

import torch

from tests.server.conftest import Live
from tests.server.test_scoring import reference

ROWS = [
    {
        "question": "Once upon a time there was a",
        "choices": [" little fox", " stone moon", " xylophone"],
        "gold": 0,
    },
    {
        "question": "The dog ran to the",
        "choices": [" park", " spoon", " zebra crossing"],
        "gold": 0,
    },
    {"question": "She was very", "choices": [" purple tooth", " happy", " because"], "gold": 1},
]
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
GENERATE_TASK = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "choice.yaml").write_text(CHOICE_TASK.format(data=data))
    (tmp_path / "generate.yaml").write_text(GENERATE_TASK.format(data=data))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluate(tasks: TaskManager, model: str, task: str, **arguments: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and its data loader
        return lm_eval.simple_evaluate(
            model=model,
            model_args={"model": "midlogit", "max_length": 1024, **arguments.pop("model_args")},
            tasks=[task],
            task_manager=tasks,
            log_samples=True,
            bootstrap_iters=0,
            batch_size=arguments.pop("batch_size", 1),
            **arguments,
        )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_are_log_q(
    server: Live,
    tasks: TaskManager,
    models: tuple[torch.nn.Module, torch.nn.Module],
    batch_size: int,
) -> None:
    """The harness tokenizes through the server, and is given no model folder."""
    arguments = {"base_url": f"{server.url}/v1/completions", "num_concurrent": 2}
    server.service.settings = settings_with(server, "exploratory")
    try:
        results = evaluate(
            tasks, "local-completions", "local_choice", model_args=arguments, batch_size=batch_size
        )
    finally:
        server.service.settings = settings_with(server, "balanced")
    assert len(results["samples"]["local_choice"]) == len(ROWS)
    encode = server.pair.mixing.teacher.encode
    for sample in results["samples"]["local_choice"]:
        row = sample["doc"]
        for choice, (found, greedy) in zip(row["choices"], sample["filtered_resps"], strict=True):
            context, whole = encode(row["question"]), encode(row["question"] + choice)
            expected = reference(models, server, whole, whole, len(whole) - len(context), None)
            assert float(found) == pytest.approx(sum(expected), abs=1e-4)
            assert greedy in (False, "False") or len(expected) < 4
    assert results["results"]["local_choice"]["acc,none"] > 0.5


def test_generation(server: Live, tasks: TaskManager) -> None:
    arguments = {"base_url": f"{server.url}/v1/completions"}
    results = evaluate(tasks, "local-completions", "local_generate", model_args=arguments)
    for sample in results["samples"]["local_generate"]:
        alone = server.complete(sample["doc"]["question"], max_tokens=12, temperature=0, stop=["."])
        assert sample["resps"][0][0] == alone["choices"][0]["text"]


def test_chat(server: Live, tasks: TaskManager) -> None:
    arguments = {"base_url": f"{server.url}/v1/chat/completions"}
    results = evaluate(
        tasks,
        "local-chat-completions",
        "local_generate",
        model_args=arguments,
        apply_chat_template=True,
    )
    for sample in results["samples"]["local_generate"]:
        alone = server.chat(sample["doc"]["question"], max_tokens=12, temperature=0, stop=["."])
        assert sample["resps"][0][0] == alone["choices"][0]["message"]["content"]


def settings_with(server: Live, preset: str) -> Any:
    from dataclasses import replace

    return replace(server.service.settings, preset=preset)
