"""Copies of the bundled pair in which a model has more ids than the other: a stop id of its own, or heavy padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.variants import copy_pair, edit

OWN_STOP = "<|im_end|>"
BUNDLED_STOP = {"base": 0, "teacher": 1}


def with_own_stop(folder: Path, side: str = "teacher") -> tuple[Path, Path]:
    """One side ends a text with an id that the other does not have, as ChatML tunes of Llama-family bases do.

    The new id's logits are those that the bundled stop id had, which gets the opposite ones.
    """
    own = copy_pair(folder) / side
    old = BUNDLED_STOP[side]
    stop_id = widen(own, 1, lambda head: torch.stack([head[old]]), swap=old)

    def change_tokenizer(data: dict[str, Any]) -> None:
        data["added_tokens"].append(
            {**data["added_tokens"][old], "id": stop_id, "content": OWN_STOP}
        )

    def change_config(data: dict[str, Any]) -> None:
        data["eos_token"] = OWN_STOP
        data["additional_special_tokens"].append(OWN_STOP)
        if side == "teacher":
            data["chat_template"] = data["chat_template"].replace("<|end|>", OWN_STOP)

    edit(own / "tokenizer.json", change_tokenizer)
    edit(own / "tokenizer_config.json", change_config)
    for name in ("config.json", "generation_config.json"):
        edit(own / name, lambda data: data.update(eos_token_id=stop_id))
    return folder / "base", folder / "teacher"


def with_heavy_padding(folder: Path, rows: int = 64) -> tuple[Path, Path]:
    """A base with padding rows that hold mass."""
    copy_pair(folder)

    def padding(head: torch.Tensor) -> torch.Tensor:
        noise = torch.randn((rows, head.shape[1]), generator=torch.Generator().manual_seed(0))
        return noise * head.std() * 2

    widen(folder / "base", rows, padding)
    return folder / "base", folder / "teacher"


def widen(
    folder: Path,
    rows: int,
    head_rows: Callable[[torch.Tensor], torch.Tensor],
    swap: int | None = None,
) -> int:
    """Gives a model more ids and untied heads.

    Args:
        head_rows: the new rows of the head, from the old ones. swap: an old row that is negated.

    Returns:
        the first new id.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    old = model.get_input_embeddings().weight.detach().clone()
    size, width = old.shape
    table = torch.nn.Embedding(size + rows, width)
    table.weight.data = torch.cat([old, torch.zeros(rows, width)])
    head = torch.nn.Linear(width, size + rows, bias=False)
    head.weight.data = torch.cat([old, head_rows(old)])
    if swap is not None:
        head.weight.data[swap] = -old[swap]
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    model.config.vocab_size, model.config.tie_word_embeddings = size + rows, False
    model.save_pretrained(folder)
    return size
