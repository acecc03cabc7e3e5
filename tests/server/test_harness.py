"""lm-evaluation-harness as a client: tasks made from local files, loglikelihoods against log q computed directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager

from tests.harness import ROWS, evaluate, score, write_tasks
from tests.server.conftest import Live
from tests.server.test_scoring import reference


@pytest.fixture
def tasks(tmp_path: Path) -> TaskManager:
    return write_tasks(tmp_path)


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
    most_likely = []
    for sample in results["samples"]["local_choice"]:
        texts = [(sample["doc"]["question"], choice) for choice in sample["doc"]["choices"]]
        scored = score(server.pair, texts)
        for text, (_, is_greedy), answer in zip(
            texts, scored, sample["filtered_resps"], strict=True
        ):
            context, whole = encode(text[0]), encode("".join(text))
            expected = reference(models, server, whole, whole, len(whole) - len(context), None)
            assert answer == (pytest.approx(sum(expected), abs=1e-4), is_greedy)
            most_likely.append(is_greedy)
    assert set(most_likely) == {True, False}
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
