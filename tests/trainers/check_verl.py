"""verl's own data sets read the exports: run by verl's Python, as `check_verl.py FOLDER MODEL`; imports no midlogit."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

FOLDER, MODEL = Path(sys.argv[1]), sys.argv[2]
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


def check_rl(name: str) -> None:
    """RLHFDataset renders every prompt and collates its rows, with what reward functions are given."""
    config = OmegaConf.create(
        {
            "cache_dir": str(FOLDER / "cache"),
            "max_prompt_length": 256,
            "filter_overlong_prompts": True,
            "filter_overlong_prompts_workers": 1,
        }
    )
    rows = RLHFDataset(str(FOLDER / name), TOKENIZER, config)
    table = pandas.read_parquet(FOLDER / name)
    assert len(rows) == len(table) > 0  # none was dropped as one that cannot be rendered

    batch = collate_fn([rows[n] for n in range(len(rows))])
    assert list(batch["index"]) == list(range(len(rows)))
    for row in batch["raw_prompt"]:
        assert TOKENIZER.apply_chat_template(row, add_generation_prompt=True, tokenize=False)
    for source, model, extra in zip(
        batch["data_source"], batch["reward_model"], batch["extra_info"], strict=True
    ):
        assert source == "midlogit" and model["style"] == "rule"
        assert model["ground_truth"] == extra["answer"] and extra["row_id"]


def check_sft(name: str) -> None:
    """MultiTurnSFTDataset renders whole conversations and masks all but the assistant's part of them."""
    table = pandas.read_parquet(FOLDER / name)
    config = OmegaConf.create({"max_length": 256, "pad_mode": "no_padding"})
    rows = MultiTurnSFTDataset(str(FOLDER / name), TOKENIZER, config)
    assert len(rows) == len(table) > 0
    for n, row in table.iterrows():
        read = rows[n]
        trained = read["input_ids"][read["loss_mask"] == 1].tolist()
        assert (
            TOKENIZER.decode(trained, skip_special_tokens=True).strip()
            == row["messages"][-1]["content"].strip()
        )
        assert len(row["token_ids"]) == len(row["q_logprobs"])


for job in ("chats", "texts"):
    check_rl(f"{job}.verl-rl.parquet")
    check_sft(f"{job}.verl-sft.parquet")
print("fine")
