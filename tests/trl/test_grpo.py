"""GRPO on rollouts from q*, unmodified TRL: behaviour log-probabilities, ratios and weights over three updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from midlogit import Pair, SamplingParams
from midlogit.integrations.trl import MidlogitGeneration, attach
from tests.trl.trainers import BASE, PROMPTS, TEACHER, Watch, grpo, logged

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers


@contextmanager
def attached(
    trainer: GRPOTrainer, params: SamplingParams | None = None, **options: Any
) -> Iterator[MidlogitGeneration]:
    """The trainer with rollouts from q* of its own module and the bundled teacher, the same at each run."""
    params = params or SamplingParams.preset("rollout", max_tokens=24, seed=0)
    module = trainer.accelerator.unwrap_model(trainer.model)
    with Pair.local(
        module, TEACHER, base_tokenizer=trainer.processing_class, max_num_seqs=16
    ) as pair:
        generation = MidlogitGeneration(pair, params, **options)
        attach(trainer, generation)
        yield generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["defaults with checkpointing", "temperature 0.7", "several epochs"],
)
def test_ratios_are_of_the_weights_of_each_step(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = grpo(tmp_path, **options)
    watch = Watch(trainer)
    with attached(trainer):
        trainer.train()

    temperature = options.get("temperature", 1.0)
    for weights, outputs in zip(watch.weights, watch.outputs, strict=True):
        expected = rescored(weights, outputs, temperature)
        drawn = outputs["completion_mask"].bool()
        sampled = outputs["sampling_per_token_logps"]
        assert (sampled - expected["q"])[drawn].abs().max() < 2e-5  # float32, in other batches
        assert (outputs["old_per_token_logps"] - expected["base"])[drawn].abs().max() < 1e-4
        gaps = ((expected["base"] - expected["q"]) * drawn).sum(1, keepdim=True)
        ratios = gaps.exp()
        ratios[ratios > 3] = 0  # sequence_mask, TRL's default
        assert (outputs["importance_sampling_ratio"] - ratios).abs().max() < 1e-3

    first, last = watch.weights[0], watch.weights[-1]
    assert any((first[name] != last[name]).any() for name in first)
    assert max(logged(trainer, "midlogit/engine_noise_max")) < 1e-4


def rescored(
    weights: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], temperature: float
) -> dict[str, torch.Tensor]:
    """log q* and the base's log-probabilities of a batch's completions, by a new pair with these weights."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.load_state_dict(weights)
    texts, rows = [], []
    for prompt, prompt_mask, ids, mask in zip(
        *(
            outputs[f"{part}_{kind}"]
            for part in ("prompt", "completion")
            for kind in ("ids", "mask")
        ),
        strict=True,
    ):
        rows.append(ids[mask.bool()].tolist())
        texts.append(prompt[prompt_mask.bool()].tolist() + rows[-1])

    size = outputs["completion_ids"].shape[1]
    params = SamplingParams.preset("rollout", max_tokens=24, temperature=temperature)
    with Pair.local(model, TEACHER) as pair:
        scores = pair.score(texts, params)
    found = {"q": torch.zeros(len(texts), size), "base": torch.zeros(len(texts), size)}
    for n, (score, ids) in enumerate(zip(scores, rows, strict=True)):
        facts = score.diagnostics
        found["q"][n, : len(ids)] = torch.tensor(facts.logprobs[-len(ids) :])
        found["base"][n, : len(ids)] = torch.tensor(facts.base_tempered_logprobs[-len(ids) :])
    return found


def test_bfloat16_autocast_is_noise_and_no_more(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, bf16=True)
    with attached(trainer) as generation:
        trainer.train()
    assert len(generation.rollouts) == 8
    assert 0 < max(logged(trainer, "midlogit/engine_noise_mean")) < 0.05


def test_adapters_are_part_of_the_policy(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = grpo(tmp_path, peft_config=lora, learning_rate=1e-2)
    with attached(trainer) as generation:
        trainer.train()
        noise = logged(trainer, "midlogit/engine_noise_max")
        assert max(noise) < 1e-4
        assert generation.rollouts[0].weight_versions[0].version == 2
    assert any(
        weight.abs().max() > 0
        for name, weight in trainer.model.named_parameters()
        if "lora_B" in name
    )


def test_a_copy_of_the_policy_gets_its_weights(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    with Pair.local(BASE, TEACHER, max_num_seqs=16) as pair:
        attach(trainer, MidlogitGeneration(pair))
        trainer.train()
    assert max(logged(trainer, "midlogit/engine_noise_max")) < 1e-4


def test_a_fixed_seed_draws_anew_at_each_row_and_step(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, max_steps=2, learning_rate=0.0)
    params = SamplingParams.preset("rollout", max_tokens=24, seed=7)
    watch = Watch(trainer)
    with attached(trainer, params):
        trainer.train()
    drawn = [tuple(row) for outputs in watch.outputs for row in outputs["completion_ids"].tolist()]
    assert len(set(drawn)) > 12
    assert max(logged(trainer, "frac_reward_zero_std")) < 1


def test_each_side_reads_messages_in_its_own_form(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def reward(completions: list[Any], alpha: list[float], **_: object) -> list[float]:
        seen.append(alpha)
        return [float(len(completion[0]["content"])) for completion in completions]

    prompts = [[{"role": "user", "content": "What do cats like?"}]] * 4
    trainer = grpo(tmp_path, prompts=prompts, reward=reward, max_steps=1)
    with attached(trainer) as generation:
        trainer.train()
        rollout = generation.rollouts[0]

    base, teacher = (
        trainer.processing_class.decode(ids)
        for ids in (rollout.prompt_token_ids, rollout.teacher_prompt_token_ids)
    )
    assert base.startswith("Question:")
    assert teacher != base
    assert len(seen[0]) == 8
    assert logged(trainer, "sampling/importance_sampling_ratio/mean")


def test_trl_ignores_the_logprobs_of_a_rollout_func_alone(tmp_path: Path) -> None:
    """Pins what TRL does, and why `attach` is needed beside `rollout_func`."""
    made: list[MidlogitGeneration] = []
    trainer = grpo(
        tmp_path,
        max_steps=1,
        rollout_func=lambda rows, trainer: made[0].rollout_func(rows, trainer),
    )
    watch = Watch(trainer)
    with Pair.local(trainer.model, TEACHER) as pair:
        made.append(MidlogitGeneration(pair))
        made[0].bind(trainer)
        trainer.train()
    assert "sampling_per_token_logps" in watch.outputs[0]
    assert "importance_sampling_ratio" not in watch.outputs[0]


def test_a_teacher_prompt_is_made_of_the_students_ids(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, max_steps=1)
    request = [{"role": "user", "content": "What do cats like?"}]
    with attached(trainer, teacher_prompt=lambda ids: request) as generation:
        trainer.train()
        rollout = generation.rollouts[0]
    assert rollout.teacher_prompt_token_ids == generation.pair.mixing.teacher.encode_chat(request)
    assert rollout.prompt_token_ids in trainer.processing_class(PROMPTS)["input_ids"]


def test_metrics_split_the_shift_from_the_noise(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    with attached(trainer):
        trainer.train()
    for kl, shift, ratio, ess in zip(
        *(logged(trainer, f"midlogit/{n}") for n in ("kl", "shift", "ratio_mean", "sequence_ess")),
        strict=True,
    ):
        assert 0 < kl <= 0.25 / 24 + 1e-6
        assert abs(shift - kl) < 0.03  # the mean over drawn tokens, and the expectation
        assert abs(ratio - 1) < 0.1
        assert 0.3 < ess <= 1
