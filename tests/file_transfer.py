"""A backend of vLLM's weight transfer for tests, registered on import: as NCCL's of vLLM 0.32, but it reads a file.

A server imports it as the extension of its worker: `--worker-extension-cls tests.file_transfer.Extension`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import reload

NAME = "file"


class FileTransfer(WeightTransferEngine[Any, Any]):
    """Reads the announced tensors from the file of init_info, and notes each init_info in a line beside it."""

    init_info_cls = update_info_cls = SimpleNamespace

    def init_transfer_engine(self, init_info: Any) -> None:
        self.file = init_info.file
        with Path(self.file).with_suffix(".inits").open("a") as inits:
            print(json.dumps(vars(init_info)), file=inits)

    def start_weight_update(self) -> None:
        with torch.device(self.device):
            reload.initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        weights = load_file(self.file)
        self.model.load_weights((name, weights[name]) for name in update_info.names)

    def finish_weight_update(self) -> None:
        with torch.device(self.device):
            reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


class Extension:
    """Nothing: vLLM's worker imports the module for its sake."""


WeightTransferEngineFactory.register_engine(NAME, FileTransfer)
