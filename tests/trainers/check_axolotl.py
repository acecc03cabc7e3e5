"""axolotl's own loader, collators and distillation loss take the exports; run as `check_axolotl.py FOLDER MODEL`.

The student is the teacher itself. Its loss against the teacher's candidates is zero where every candidate stands at the
position that predicts its token, and far from zero where they stand one position off. Imports no midlogit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import torch
from axolotl.integrations.kd.chat_template import ChatTemplateStrategyWithKDv2
from axolotl.integrations.kd.collator import (
    DataCollatorForKD,
    KDBatchSamplerDataCollatorForSeq2Seq,
)
from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss
from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter
from axolotl.utils.data.sft import _load_raw_datasets
from axolotl.utils.dict import DictDefault
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, MODEL = Path(sys.argv[1]), sys.argv[2]
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


def load(name: str) -> datasets.Dataset:
    """The rows as axolotl prepares them for its trainer."""
    config = DictDefault(
        {
            "datasets": [{"path": str(FOLDER / name), "ds_type": "parquet", "type": None}],
            "dataset_prepared_path": str(FOLDER / "prepared"),
            "dataset_num_proc": 1,
            "sequence_len": 512,
            "skip_prepare_dataset": False,
            "is_preprocess": True,
            "seed": 1,
        }
    )
    rows, _ = _load_raw_datasets(config, config.datasets, TOKENIZER, "train")
    return rows


def loss_of(batch: dict[str, torch.Tensor], shift: int = 0) -> float:
    """The distillation loss per token, the candidates moved by some positions."""
    student = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = student.model(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    loss = LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, compute_ce_loss=False
    )
    targets = [
        torch.roll(batch[name], shift, 1)
        for name in ("target_token_ids", "target_logprobs", "target_mask")
    ]
    tokens = (batch["labels"] != -100).sum()
    return float(
        loss(student.lm_head.weight, hidden, *targets, true_labels=batch["labels"]) / tokens
    )


def by_the_plugins_strategy(rows: datasets.Dataset, name: str) -> list[dict[str, list]]:
    """The same conversations and candidates as the plugin's own prompt strategy prepares them."""
    prompter = ChatTemplatePrompter(
        TOKENIZER,
        chat_template=TOKENIZER.chat_template,
        message_property_mappings={"role": "role", "content": "content"},
    )
    strategy = ChatTemplateStrategyWithKDv2(
        prompter, TOKENIZER, False, 512, roles_to_train=["assistant"], train_on_eos="turn"
    )
    prepared = []
    for row, messages in zip(
        rows, pq.read_table(FOLDER / name)["messages"].to_pylist(), strict=True
    ):
        scored = [n for n, ids in enumerate(row["target_token_ids"]) if ids]
        span = slice(scored[0], scored[-1] + 1)
        prompt = {
            "messages": messages,
            "logprobs": row["target_logprobs"][span],
            "target_token_ids": row["target_token_ids"][span],
        }
        tokenized = {key: list(value) for key, value in strategy.tokenize_prompt(prompt).items()}
        assert tokenized["input_ids"] == row["input_ids"]
        # Padding of −inf times a mass of 0 would be no number.
        tokenized["target_logprobs"] = [
            [max(value, -1e9) for value in position] for position in tokenized["target_logprobs"]
        ]
        prepared.append(tokenized)
    return prepared


def check(job: str) -> None:
    rows = load(f"{job}.axolotl-kd-teacher.parquet")
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["target_logprobs"])
        assert sum(bool(ids) for ids in row["target_token_ids"]) == sum(
            i != -100 for i in row["labels"]
        )

    batch = DataCollatorForKD(TOKENIZER)([dict(row) for row in rows])
    assert batch["target_logprobs"].shape[:2] == batch["input_ids"].shape
    assert abs(loss_of(batch)) < 1e-4, loss_of(batch)
    assert loss_of(batch, 1) > 0.5 and loss_of(batch, -1) > 0.5

    packed = KDBatchSamplerDataCollatorForSeq2Seq(TOKENIZER)([[dict(row) for row in rows]])
    assert (
        packed["target_logprobs"].shape[1]
        == packed["input_ids"].shape[1]
        == sum(map(len, rows["input_ids"]))
    )

    if job == "chats":  # why exports are tokenized: these candidates are one position late
        own = by_the_plugins_strategy(rows, f"{job}.verl-sft.parquet")
        late = DataCollatorForKD(TOKENIZER)(own)
        assert loss_of(late) > 1 and abs(loss_of(late, -1)) < 1e-4

    of_q = DataCollatorForKD(TOKENIZER)([dict(row) for row in load(f"{job}.axolotl-kd.parquet")])
    assert 0.01 < loss_of(of_q) < 5 and torch.equal(of_q["input_ids"], batch["input_ids"])


if __name__ == "__main__":  # axolotl's loader starts processes
    check("chats")
    check("texts")
    print("fine")
