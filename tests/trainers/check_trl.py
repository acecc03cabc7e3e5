"""TRL's own trainers prepare the exports: run as `check_trl.py FOLDER MODEL`; imports no midlogit."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.data_utils import is_conversational

FOLDER, MODEL = Path(sys.argv[1]), sys.argv[2]
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


def load(name: str) -> datasets.Dataset:
    return datasets.load_dataset(
        "parquet", data_files=str(FOLDER / name), split="train", cache_dir=str(FOLDER / "cache")
    )


def check_sft(name: str, *, is_chat: bool) -> None:
    """SFTTrainer tokenizes the data, and trains on the completions alone and their own ids."""
    rows = load(name)
    assert is_conversational(rows[0]) == is_chat
    options = SFTConfig(
        output_dir=str(FOLDER / "sft"), report_to=[], use_cpu=True, bf16=False, max_steps=1
    )
    trainer = SFTTrainer(MODEL, args=options, train_dataset=rows, processing_class=TOKENIZER)
    assert len(trainer.train_dataset) == len(rows)

    same = 0
    for row, prepared in zip(rows, trainer.train_dataset, strict=True):
        trained = [i for i in prepared["labels"] if i != -100]
        text = TOKENIZER.decode(trained, skip_special_tokens=True)
        wanted = row["completion"][0]["content"] if is_chat else row["completion"]
        assert text.strip() == wanted.strip(), (text, wanted)
        assert len(row["token_ids"]) == len(row["q_logprobs"]) == len(row["base_logprobs"])
        ended = row["token_ids"] + [TOKENIZER.eos_token_id] * (row["finish_reason"] == "length")
        same += trained == ended
    assert same >= len(rows) - 1, same  # a text may have a second spelling in ids
    trainer.train()


def check_prompts(name: str, *, is_chat: bool) -> None:
    """GRPOTrainer samples from each prompt, and its reward function gets the input's columns."""
    rows = load(name)
    assert len(rows) == len(set(rows["row_id"])) and is_conversational(rows[0]) == is_chat
    seen: list[str] = []

    def reward(prompts: list, completions: list, answer: list[str], **_: object) -> list[float]:
        seen.extend(answer)
        assert all(isinstance(prompt, list) == is_chat for prompt in prompts)
        return [float(len(str(completion))) for completion in completions]

    options = GRPOConfig(
        output_dir=str(FOLDER / "grpo"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
    )
    trainer = GRPOTrainer(MODEL, reward, options, train_dataset=rows, processing_class=TOKENIZER)
    trainer.train()
    assert seen and set(seen) <= set(rows["answer"])


check_sft("chats.trl-sft.parquet", is_chat=True)
check_sft("texts.trl-sft.parquet", is_chat=False)
check_prompts("chats.trl-prompt.parquet", is_chat=True)
check_prompts("texts.trl-prompt.parquet", is_chat=False)
print("fine")
