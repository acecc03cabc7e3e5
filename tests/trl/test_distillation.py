"""Distillation, GOLD and IW-OPD on states that q* visits, and the ending ids of student and teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

from midlogit import EqualKL, Pair, SamplingParams
from midlogit.integrations.trl import MidlogitGeneration, align_stop_ids, attach
from midlogit.models.checkpoint import open_checkpoints
from midlogit.models.mixing import Mixing
from tests.trl.trainers import BASE, TEACHER, logged

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers

LENGTH = 16
QUESTIONS = ["What do cats like?", "Why is the sky blue?", "Where does a fox live?"]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 6,
    "max_completion_length": LENGTH,
    "max_steps": 2,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def models() -> tuple[Any, Any]:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (BASE, TEACHER)
    )
    return student, teacher


def train(trainer: Any, tokenizer: Any, **changes: Any) -> MidlogitGeneration:
    """Trains on states of q*; the middle itself, as these losses take no weights, unless `changes` says otherwise."""
    params = SamplingParams.preset("rollout", **{"alpha_rule": EqualKL(), **changes})
    student = trainer.accelerator.unwrap_model(trainer.model)
    with Pair.local(student, TEACHER, base_tokenizer=tokenizer, max_num_seqs=16) as pair:
        generation = MidlogitGeneration(pair, params)
        attach(trainer, generation)
        trainer.train()
    return generation


def test_distillation_visits_the_states_of_the_middle(tmp_path: Path) -> None:
    student, teacher = models()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    align_stop_ids(teacher, Mixing(*open_checkpoints(None, None)))
    prompts = [f"Question: {question}\nAnswer:" for question in QUESTIONS] * 8
    trainer = DistillationTrainer(
        student,
        teacher,
        DistillationConfig(str(tmp_path), beta=1.0, **COMMON),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    generation = train(trainer, tokenizer)

    assert len(logged(trainer, "loss")) == 2
    assert 0.2 < logged(trainer, "midlogit/alpha")[0] < 0.8
    assert {rollout.weight_versions[0].version for rollout in generation.rollouts} == {1}
    ends = {r.token_ids[-1] for r in generation.rollouts if r.finish_reason == "stop"}
    assert ends <= {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("kind", "config", "rule"),
    [(GOLDTrainer, GOLDConfig, "equal-kl"), (IWOPDTrainer, IWOPDConfig, "equal-kl")],
    ids=["GOLD", "IW-OPD"],
)
def test_experimental_trainers(tmp_path: Path, kind: Any, config: Any, rule: str) -> None:
    student, teacher = models()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(TEACHER).chat_template
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
        for question in QUESTIONS * 4
    ]
    trainer = kind(
        model=student,
        teacher_model=teacher,
        args=config(str(tmp_path), lmbda=1.0, temperature=1.0, top_p=1.0, **COMMON),
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer,
    )
    generation = train(trainer, tokenizer)
    assert len(generation.rollouts) == 6
    assert logged(trainer, "loss")


def test_aligned_teachers_end_with_the_students_id() -> None:
    _, teacher = models()
    mixing = Mixing(*open_checkpoints(None, None))
    ids = torch.tensor([mixing.teacher.encode("The end.")])
    with torch.no_grad():
        before = teacher(ids).logits
        swapped = align_stop_ids(teacher, mixing)
        after = teacher(ids).logits

    student_id, teacher_id = mixing.base.stop_ids[0], mixing.teacher.stop_ids[0]
    assert swapped == (student_id, teacher_id)
    order = list(range(before.shape[-1]))
    order[student_id], order[teacher_id] = teacher_id, student_id
    assert torch.equal(after, before[..., order])
    assert align_stop_ids(teacher, Mixing(mixing.base, mixing.base)) is None
