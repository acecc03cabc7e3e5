"""GRPO on stories that must hold three given words, with rollouts from q* of the policy and a teacher.

    python examples/train/grpo.py                                         # the bundled pair, minutes on two cores
    python examples/train/grpo.py --steps 300 --batch 256 --device cuda   # one H100
    python examples/train/grpo.py --rule fixed:0                          # the policy's own rollouts, to compare

The reward is 1 for a story with all three words, else 0: the bundled base hardly ever earns it, its teacher now and
then. Logs the reward of the rollouts, the policy's own success on requests that it never trains on, and what midlogit
says of the rollouts (docs/training.md), also as JSON lines in OUT/log.jsonl.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from midlogit import FixedAlpha, Pair, SamplingParams, parse_rule
from midlogit.integrations.trl import MidlogitGeneration, attach
from midlogit.models.checkpoint import bundled

NOUNS = ["fox", "ball", "tree", "boat", "cake", "dog", "cat", "bird", "bear", "car", "flower"]
VERBS = ["run", "jump", "swim", "play", "sing", "climb", "help", "find", "eat", "sleep", "hide"]
ADJECTIVES = ["big", "red", "happy", "sad", "brave", "small", "blue", "warm", "funny", "shiny"]
LENGTH = 64


def main() -> None:
    options = read_options()
    rng = random.Random(options.seed)
    rows = [request(rng) for _ in range(options.steps * options.batch + 256)]
    train, held_out = rows[256:], rows[:256]

    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    trainer = GRPOTrainer(
        model.to(options.device),
        all_words,
        GRPOConfig(
            options.out,
            per_device_train_batch_size=options.batch,
            num_generations=8,
            max_completion_length=LENGTH,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            vllm_importance_sampling_mode=options.mode,
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            use_cpu=options.device == "cpu",
            bf16=False,
            seed=options.seed,
        ),
        train_dataset=Dataset.from_list(train),
        processing_class=AutoTokenizer.from_pretrained(options.base),
    )

    # The pair shares the trainer's module: its weights are always those of the current step.
    with Pair.local(
        model,
        options.teacher,
        base_tokenizer=trainer.processing_class,
        device=options.device,
        dtype="float32",
        max_num_seqs=options.batch,
    ) as pair:
        changes = {"alpha_rule": parse_rule(options.rule)} if options.rule else {}
        params = SamplingParams.preset("rollout", max_tokens=LENGTH, seed=options.seed, **changes)
        attach(trainer, MidlogitGeneration(pair, params))
        trainer.add_callback(
            OwnSuccess(trainer, pair, held_out[: options.evaluate], every=options.every)
        )
        trainer.train()
    write_log(trainer, Path(options.out))


def request(rng: random.Random) -> dict:
    words = [rng.choice(kind) for kind in (NOUNS, VERBS, ADJECTIVES)]
    text = "Can you tell me a story with the words {}, {} and {}?".format(*words)
    return {"prompt": [{"role": "user", "content": text}], "words": words}


def used(text: str, words: list[str]) -> int:
    """How many of the words a text holds, in any form that begins with them."""
    return sum(re.search(rf"\b{word}", text.lower()) is not None for word in words)


def all_words(completions, words, log_metric, **_) -> list[float]:
    counts = [used(c[0]["content"], w) for c, w in zip(completions, words, strict=True)]
    log_metric("words", sum(counts) / len(counts))
    return [float(count == 3) for count in counts]


class OwnSuccess(TrainerCallback):
    """Samples from the policy alone, which is q* at α = 0, and logs its success."""

    def __init__(self, trainer: GRPOTrainer, pair: Pair, rows: list[dict], every: int) -> None:
        self.trainer, self.pair, self.rows, self.every = trainer, pair, rows, every

    def on_train_begin(self, args, state, control, **_) -> None:
        self.evaluate(state)

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step % self.every == 0:
            self.evaluate(state)

    def evaluate(self, state) -> None:
        policy = SamplingParams.preset(
            "rollout", max_tokens=LENGTH, seed=state.global_step, alpha_rule=FixedAlpha(0.0)
        )
        completions = self.pair.generate([row["prompt"] for row in self.rows], policy)
        counts = [used(c.text, self.rows[c.index]["words"]) for c in completions]
        result = {
            "policy/success": sum(count == 3 for count in counts) / len(counts),
            "policy/words": sum(counts) / len(counts),
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
    parser.add_argument("--rule", help="of α; by default a quarter of a nat per story")
    parser.add_argument("--mode", default="sequence_mask", help="TRL's importance sampling")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--evaluate", type=int, default=64, help="held-out requests, at most 256")
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="grpo-run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
