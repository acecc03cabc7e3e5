"""Distillation of a teacher into a base on the states that q* of both visits.

    python examples/train/distill.py                                         # the bundled pair, minutes on two cores
    python examples/train/distill.py --steps 120 --batch 192 --device cuda   # one H100
    python examples/train/distill.py --rule fixed:0                          # the student's own states, to compare

TRL's DistillationTrainer needs no weights for its samples: its loss looks at the whole rows of both models wherever the
rollouts went. The two bundled models end with different ids, so the teacher that the loss reads has its own aligned.
Logs KL(student‖teacher) on the student's own fresh answers, and what midlogit says of the rollouts (docs/training.md),
also as JSON lines in OUT/log.jsonl.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from midlogit import EqualKL, FixedAlpha, Pair, SamplingParams, parse_rule
from midlogit.integrations.trl import MidlogitGeneration, align_stop_ids, attach
from midlogit.models.checkpoint import bundled

THINGS = ["fox", "cat", "dog", "bird", "fish", "bear", "boat", "car", "tree", "river", "moon"]
FORMS = [
    "What is a {}?",
    "Where can you find a {}?",
    "What does a {} look like?",
    "Why do people like a {}?",
    "Tell me a short story about a {}.",
    "Please write a story about a {}.",
]
LENGTH = 48


def main() -> None:
    options = read_options()
    rng = random.Random(options.seed)
    prompts = [f"Question: {form.format(thing)}\nAnswer:" for form in FORMS for thing in THINGS]
    rng.shuffle(prompts)
    train, held_out = prompts[16:], prompts[:16]

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(options.device)
        for name in (options.base, options.teacher)
    )
    with Pair.local(
        student,
        options.teacher,
        base_tokenizer=tokenizer,
        device=options.device,
        dtype="float32",
        max_num_seqs=options.batch,
    ) as pair:
        align_stop_ids(teacher, pair.mixing)
        trainer = DistillationTrainer(
            student,
            teacher,
            DistillationConfig(
                options.out,
                beta=1.0,  # reverse KL
                per_device_train_batch_size=options.batch,
                max_completion_length=LENGTH,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                logging_steps=1,
                disable_tqdm=True,
                report_to=[],
                save_strategy="no",
                use_cpu=options.device == "cpu",
                bf16=False,
                seed=options.seed,
            ),
            train_dataset=Dataset.from_dict({"prompt": train * options.batch}),
            processing_class=tokenizer,
        )
        params = SamplingParams.preset(
            "rollout", alpha_rule=parse_rule(options.rule), seed=options.seed
        )
        attach(trainer, MidlogitGeneration(pair, params))
        trainer.add_callback(
            OwnStates(trainer, pair, held_out * options.repeats, every=options.every)
        )
        trainer.train()
    write_log(trainer, Path(options.out))


class OwnStates(TrainerCallback):
    """Samples from the student alone, which is q* at α = 0, and logs its KL to the teacher there."""

    def __init__(self, trainer: DistillationTrainer, pair: Pair, prompts: list[str], every: int):
        self.trainer, self.pair, self.prompts, self.every = trainer, pair, prompts, every

    def on_train_begin(self, args, state, control, **_) -> None:
        self.evaluate(state)

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step % self.every == 0:
            self.evaluate(state)

    def evaluate(self, state) -> None:
        own = SamplingParams.preset(
            "rollout", max_tokens=LENGTH, alpha_rule=FixedAlpha(0.0), seed=state.global_step
        )
        completions = self.pair.generate(self.prompts, own)
        kls = [kl for c in completions for kl in c.diagnostics.kl_teacher]
        result = {
            "student/kl_per_token": sum(kls) / len(kls),
            "student/kl_per_text": sum(kls) / len(completions),
            "student/stop_rate": sum(c.finish_reason == "stop" for c in completions)
            / len(completions),
        }
        self.trainer.log(result)


def write_log(trainer, folder: Path) -> None:
    """Writes every logged step as one line of JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) + "\n" for entry in trainer.state.log_history]
    (folder / "log.jsonl").write_text("".join(lines))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=str(bundled("base")))
    parser.add_argument("--teacher", default=str(bundled("teacher")))
    parser.add_argument("--rule", default=EqualKL().spec, help="of α: whose states are visited")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--repeats", type=int, default=2, help="answers per held-out prompt")
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="distill-run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
