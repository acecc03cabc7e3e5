"""Weights by a file in place of NCCL: PORT.safetensors in the folder MIDLOGIT_WEIGHTS_ROOT."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass
class NCCLTrainerSendWeightsArgs:
    group: Any = None
    packed: bool = True


class NCCLWeightTransferEngine:
    @staticmethod
    def trainer_init(init_info: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(group=SimpleNamespace(), port=init_info["master_port"])

    @staticmethod
    def trainer_send_weights(
        iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: NCCLTrainerSendWeightsArgs
    ) -> None:
        root = Path(os.environ["MIDLOGIT_WEIGHTS_ROOT"])
        tensors = {name: value.detach().cpu().contiguous() for name, value in iterator}
        part = root / f"{trainer_args.group.port}.part"
        save_file(tensors, part)
        part.rename(root / f"{trainer_args.group.port}.safetensors")
