"""The example for one GPU, run as far as it goes without one: its rows, its reward, its configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.dataset.rl_dataset import RLHFDataset

from midlogit.integrations.verl.checks import require_trainable
from midlogit.integrations.verl.options import Options
from tests.conftest import BASE
from tests.verl.runs import RECIPE

NO_SERVER = f"""#!/bin/sh
[ "$2" = vllm.entrypoints.openai.api_server ] && exec sleep 600
exec {sys.executable} "$@"
"""


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """The configuration of the example's run, which hydra prints in place of it; no teacher is served."""
    out, programs = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("programs")
    (programs / "python3").write_text(NO_SERVER)
    (programs / "python3").chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", RECIPE / "one_gpu.sh", out, "--cfg", "job"]
    ran = subprocess.run(command, env=os.environ | path, cwd=out, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    _, _, printed = ran.stdout.partition("actor_rollout_ref:")
    return OmegaConf.create(f"actor_rollout_ref:{printed}")


def test_the_configuration_can_be_trained(composed: DictConfig) -> None:
    rollout = composed.actor_rollout_ref.rollout
    require_trainable(composed, Options.of(rollout).params(rollout))
    assert composed.trainer.total_training_steps == 5
    assert rollout.prompt_length + rollout.response_length <= rollout.max_model_len


def test_prompts_have_the_form_that_the_base_was_trained_on(composed: DictConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = composed.actor_rollout_ref.model.custom_chat_template
    data = RLHFDataset(composed.data.train_files, tokenizer, composed.data)
    assert len(data) >= 5 * composed.data.train_batch_size
    (message,) = data[0]["raw_prompt"]
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    assert prompt == f"Question: {message['content']}\nAnswer:"


def test_the_reward_is_the_share_of_words(
    composed: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = pandas.read_parquet(composed.data.train_files).iloc[0]
    words = row["reward_model"]["ground_truth"]
    assert all(word in row["prompt"][0]["content"] for word in words.split())

    monkeypatch.setenv("ROLLOUTS", str(tmp_path / "rollouts.jsonl"))
    score = get_custom_reward_fn(composed)
    texts = f"{words}.", words.split()[0] + "ing", ""
    found = [score("stories", text, words, extra_info={"alpha": 0.5}) for text in texts]
    assert found == [1, pytest.approx(1 / 3), 0]

    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert [line["text"] for line in lines] == list(texts)
    assert {line["alpha"] for line in lines} == {0.5}
