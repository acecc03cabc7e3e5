"""TRL's own loss on rollouts from q*, against the exact gradient of a pair of 8 ids."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from midlogit import EqualKL, Pair, SamplingParams
from midlogit.integrations.trl import MidlogitGeneration, attach
from tests.trl import toy

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers

GROUP, BATCH = 8, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    toy.make_pair(path)
    return path


class Agreement(NamedTuple):
    """How a mean gradient compares with the exact one.

    Attributes:
        length: its length along the exact gradient, as a share of that. cosine: of both.
        z: root mean square of its errors over their standard errors, in 40 directions; about 1 without a bias.
    """

    length: float
    cosine: float
    z: float


def test_the_rollout_preset_is_unbiased_under_trls_defaults(folder: Path) -> None:
    agreement = measure(folder, batches=40)
    assert agreement.z < 1.5
    assert agreement.cosine > 0.99
    assert 0.95 < agreement.length < 1.05


def test_weights_of_whole_completions_correct_the_middle_itself(folder: Path) -> None:
    params = SamplingParams.preset("rollout", alpha_rule=EqualKL(), seed=1)
    agreement = measure(folder, 24, params, checked=False, mode="sequence_truncate", clip=1e9)
    assert agreement.z < 1.5
    assert agreement.cosine > 0.98


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_id": "teacher"},
        {"constraint_to_target": True, "target_top_p": 0.95},
    ],
    ids=["teacher's stop id", "nucleus"],
)
def test_rollouts_that_attach_refuses_are_biased(folder: Path, changes: dict[str, object]) -> None:
    params = SamplingParams.preset("rollout", alpha_rule=EqualKL(), seed=1, **changes)
    agreement = measure(folder, 12, params, checked=False, mode="sequence_truncate", clip=1e9)
    assert agreement.z > 3


def test_without_correction_rollouts_are_biased(folder: Path) -> None:
    params = SamplingParams.preset("rollout", alpha_rule=EqualKL(), seed=1)
    assert measure(folder, 12, params, checked=False, corrected=False).z > 3


def measure(
    folder: Path,
    batches: int,
    params: SamplingParams | None = None,
    *,
    checked: bool = True,
    corrected: bool = True,
    mode: str = "sequence_mask",
    clip: float = 3.0,
) -> Agreement:
    """TRL's mean gradient over batches of rollouts, against the exact one.

    Args:
        params: of the rollouts; the rollout preset by default.
        checked: attach as a user does; off, past what `attach` refuses.
        corrected: off, only a rollout_func, whose log-probabilities TRL ignores.
        mode, clip: TRL's importance sampling; by default TRL's own.
    """
    model, tokenizer = toy.load(folder, "base")
    args = GRPOConfig(
        str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        num_generations=GROUP,
        max_completion_length=toy.LENGTH,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        loss_type="dr_grpo",
        scale_rewards="none",
        gradient_checkpointing=False,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=clip,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model,
        toy.reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": [toy.PROMPT] * BATCH}),
        processing_class=tokenizer,
    )
    with Pair.local(
        model, folder / "teacher", base_tokenizer=tokenizer, max_num_seqs=BATCH, speculation="off"
    ) as pair:
        params = params or SamplingParams.preset("rollout", max_tokens=toy.LENGTH, seed=1)
        generation = MidlogitGeneration(pair, params)
        if checked:
            attach(trainer, generation)
        else:
            place(trainer, generation, corrected=corrected)
        rows = torch.stack([batch_gradient(trainer) for _ in range(batches)])

    exact = toy.exact_gradient(model, tokenizer(toy.PROMPT)["input_ids"])
    target = (
        exact * (1 - 1 / GROUP) / toy.LENGTH
    )  # the group's mean costs one part; dr_grpo divides
    return agreement_of(rows, target)


def place(trainer: GRPOTrainer, generation: MidlogitGeneration, *, corrected: bool) -> None:
    """What `attach` does after its checks, or no more than a rollout_func."""
    generation.bind(trainer)
    if corrected:
        trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
        trainer.vllm_generation = generation
    else:
        trainer.rollout_func = generation.rollout_func


def batch_gradient(trainer: GRPOTrainer) -> torch.Tensor:
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    outputs = trainer._generate_and_score_completions([{"prompt": toy.PROMPT}] * BATCH)
    return toy.gradient(trainer._compute_loss(trainer.model, outputs), trainer.model)


def agreement_of(rows: torch.Tensor, target: torch.Tensor) -> Agreement:
    mean = rows.mean(0)
    directions = torch.randn(
        (len(target), 40), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    errors = (rows - target) @ directions
    z = errors.mean(0) / (errors.std(0) / len(rows) ** 0.5)
    return Agreement(
        length=(mean @ target / (target @ target)).item(),
        cosine=(mean @ target / (mean.norm() * target.norm())).item(),
        z=z.square().mean().sqrt().item(),
    )
