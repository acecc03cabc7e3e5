"""Writes two models of random weights in the shapes of Qwen3, with the bundled tokenizers; measures nothing.

    python -m benchmarks.random_pair FOLDER               # FOLDER/base as Qwen3-4B, FOLDER/teacher as Qwen3-14B
    python -m benchmarks.random_pair FOLDER --layers 2    # the same widths, few layers

For measurements that need the size of a pair and not its text, such as seconds for a sync of weights
(examples/train/two_gpus.py).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from midlogit.models.checkpoint import bundled

COMMON = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
SHAPES = {
    "base": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "teacher": {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of each, in place of the whole model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for side in SHAPES:
        write(options.folder / side, side, options.layers, options.device)


def write(folder: Path, side: str, layers: int | None, device: str) -> None:
    shape = SHAPES[side] | ({} if layers is None else {"num_hidden_layers": layers})
    config = Qwen3Config(**COMMON, **shape, max_position_embeddings=4096)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(bundled(side) / name, folder / name)
    print(f"{folder}: {sum(w.numel() for w in model.parameters()) / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
