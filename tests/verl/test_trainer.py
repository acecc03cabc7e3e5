"""Five steps of verl's own trainer with the recipe: on the CPU, with a vLLM server as its replica (`cpu_trainer`)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from tests.http.conftest import Urls
from tests.verl.runs import PROMPTS, RECIPE, TEMPLATE, Replica
from tests.verl.test_weight_updates import served_folder

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return solution_str.count("e") / 4
"""
STEPS = 5
SHOWN = (
    "critic/score/mean",
    "actor/grad_norm",
    "rollout_corr/rollout_is_mean",
    "rollout_corr/rollout_is_eff_sample_size",
    "rollout_corr/kl",
)
OPTIONS = """
data.train_batch_size=4 data.max_prompt_length=48 data.max_response_length=12 data.dataloader_num_workers=0
+actor_rollout_ref.model.override_config.attn_implementation=eager
actor_rollout_ref.model.use_remove_padding=False actor_rollout_ref.model.enable_gradient_checkpointing=False
actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.ppo_mini_batch_size=4
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 actor_rollout_ref.actor.optim.lr=1e-4
actor_rollout_ref.actor.fsdp_config.dtype=float32 actor_rollout_ref.actor.use_torch_compile=False
actor_rollout_ref.actor.fsdp_config.use_torch_compile=False actor_rollout_ref.ref.fsdp_config.use_torch_compile=False
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 actor_rollout_ref.rollout.tensor_model_parallel_size=1
actor_rollout_ref.rollout.agent.num_workers=1 actor_rollout_ref.rollout.n=4
actor_rollout_ref.rollout.free_cache_engine=False
reward.num_workers=1 reward.custom_reward_function.name=compute_score
transfer_queue.backend.SimpleStorage.num_data_storage_units=1
trainer.n_gpus_per_node=1 trainer.device=cpu trainer.logger=["console","file"] trainer.val_before_train=False
trainer.resume_mode=disable
ray_kwargs.ray_init.num_cpus=6 +ray_kwargs.ray_init.num_gpus=1 +ray_kwargs.ray_init.include_dashboard=False
+ray_kwargs.ray_init.object_store_memory=100000000
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows enough for all steps, and the reward."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [
        {
            "data_source": "stories",
            "prompt": prompt,
            "ability": "writing",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index, prompt in enumerate(PROMPTS * STEPS)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


def test_five_steps(urls: Urls, data: Path) -> None:
    root = RECIPE.parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root / 'src'}:{root}",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "tests.verl.cpu_platform,tests.verl.cpu_trainer",
        "VERL_FILE_LOGGER_PATH": str(data / "metrics.jsonl"),
        "POLICY_URL": urls.base,
        "POLICY_FOLDER": str(data / "weights"),
    }
    template = TEMPLATE.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    overrides = [
        *OPTIONS.split(),
        f"actor_rollout_ref.model.path={served_folder(urls.base)}",
        f'actor_rollout_ref.model.custom_chat_template="{template}"',
        f"actor_rollout_ref.rollout.custom.midlogit.teacher={urls.teacher}",
        f"data.train_files={data / 'rows.parquet'}",
        f"data.val_files={data / 'rows.parquet'}",
        f"reward.custom_reward_function.path={data / 'reward.py'}",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={data / 'checkpoints'}",
    ]
    recipe = [f"--config-path={RECIPE}", "--config-name=midlogit"]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *recipe, *overrides]
    try:
        ran = subprocess.run(command, cwd=data, env=environment, capture_output=True, text=True)
    finally:
        asyncio.run(Replica(urls.base).update(served_folder(urls.base), 0))
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]

    steps = [json.loads(line)["data"] for line in (data / "metrics.jsonl").open()]
    for step in steps:
        print({name: round(step[name], 3) for name in SHOWN})
    assert [step["training/global_step"] for step in steps] == [*range(1, STEPS + 1)]
    assert all(0.3 < step["rollout_corr/rollout_is_mean"] < 2 for step in steps)  # E[π/q*] ≤ 1
