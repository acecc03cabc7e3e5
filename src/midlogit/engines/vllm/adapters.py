"""A LoRA adapter as PEFT saves it, checked against its model before anything is loaded; reads no weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from midlogit.errors import ModelUnavailable, first_line
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.files import open_config
from midlogit.models.weights import Stored, architecture, tensors_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "Merge it into the weights (PeftModel.merge_and_unload) and name the folder of the result."
PLAIN = "Open it without base_lora, and merge what is trained into the weights that are given."
LORA_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits its model.

    Attributes:
        folder: what holds it.
        most_rank: vLLM's smallest limit of ranks that holds all of the adapter's.
        weights: numbers that vLLM sets aside for it.
    """

    folder: Path
    most_rank: int
    weights: int

    @classmethod
    def open(cls, folder: str | Path, checkpoint: Checkpoint) -> Adapter:
        """Reads the configuration and the header of an adapter.

        Args:
            checkpoint: the model that it is for.

        Raises:
            ModelUnavailable: a folder that holds none, one that vLLM cannot apply, or one of another model.
        """
        from vllm.config.lora import MaxLoRARanks

        folder = Path(folder).expanduser().resolve()
        helper = _open_config(folder)
        pairs = _open_pairs(folder)

        whole = open_config(checkpoint.name, trust_remote_code=checkpoint.trust_remote_code)
        model = architecture(replace(checkpoint, config=whole))
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        for module, (a, b) in pairs.items():
            _require_fit(module, a, b, shapes.get(f"{module}.weight"), checkpoint.name)
            _require_rank(helper, module, a)

        rank = max(a.shape[0] for a, _ in pairs.values())
        most = next((limit for limit in sorted(get_args(MaxLoRARanks)) if limit >= rank), None)
        if most is None:
            known = max(get_args(MaxLoRARanks))
            raise ModelUnavailable(
                f"{folder} has rank {rank}, and vLLM takes at most {known}.", MERGE
            )
        embedding = {id(model.get_input_embeddings().weight)}
        sizes = [
            sum(w.shape) for w in model.parameters() if w.dim() == 2 and id(w) not in embedding
        ]
        return cls(folder, most, most * sum(sizes))

    @property
    def options(self) -> dict[str, Any]:
        """The EngineArgs that make room for it."""
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": self.most_rank}

    def request(self) -> Any:
        """What vLLM's requests carry to be answered with it."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.folder.name, 1, str(self.folder))


def load_adapter(core: Any, adapter: Adapter) -> Any:
    """Loads an adapter, so that its errors come before a request does; returns what requests carry.

    Raises:
        ModelUnavailable: vLLM cannot apply it to the model.
    """
    try:
        core.add_lora(adapter.request())
    except Exception as error:  # a damaged file fails in many ways
        core.shutdown()
        raise ModelUnavailable(
            f"vLLM cannot apply {adapter.folder}: {first_line(error)}"
        ) from error
    return adapter.request()


def leave_head(model: Any) -> None:
    """Has logits made by the head alone, which no adapter changes: vLLM's LoRA wants rows of the batch there."""
    from vllm.lora.layers import LogitsProcessorWithLoRA

    for module in model.modules():
        if isinstance(module, LogitsProcessorWithLoRA):
            module.punica_wrapper.add_lora_logits = lambda logits, *others: logits


def _open_config(folder: Path) -> Any:
    """The configuration, as vLLM reads it.

    Raises:
        ModelUnavailable: it is not there, damaged, or of an adapter that vLLM cannot apply.
    """
    from vllm.config import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    if not (folder / CONFIG).is_file():
        raise ModelUnavailable(
            f"{folder} holds no {CONFIG}.", "Give the folder of an adapter that PEFT saved."
        )
    try:
        given = json.loads((folder / CONFIG).read_bytes())
        kind = given.get("peft_type", "LORA")
        helper = PEFTHelper.from_dict(given)
    except Exception as error:  # a damaged file fails in many ways
        raise ModelUnavailable(f"{folder / CONFIG} cannot be read: {first_line(error)}") from error
    if kind != "LORA":
        raise ModelUnavailable(f"{folder} is an adapter of the kind {kind}, not LORA.", MERGE)
    if helper.modules_to_save:
        names = ", ".join(helper.modules_to_save)
        raise ModelUnavailable(
            f"{folder} replaces whole modules (modules_to_save: {names}).", MERGE
        )
    try:
        helper.validate_legal(LoRAConfig(max_lora_rank=512))
    except ValueError as error:
        if helper.r <= 512:  # ranks are looked at with the weights
            raise ModelUnavailable(
                f"vLLM cannot apply {folder}: {first_line(error)}", MERGE
            ) from error
    return helper


def _open_pairs(folder: Path) -> dict[str, tuple[Stored, Stored]]:
    """The A and B of each module of the model that the adapter changes.

    Raises:
        ModelUnavailable: no such file, or one that holds other tensors.
    """
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors_in(folder / WEIGHTS):
        matched = LORA_TENSOR.fullmatch(name)
        if matched is None or matched[1].endswith(("lm_head", "embed_tokens")):
            raise ModelUnavailable(
                f"{tensor.file} holds {name}: only linear layers below the head can be changed"
                " here, no embedding and no added token.",
                MERGE,
            )
        found.setdefault(matched[1], {})[matched[2]] = tensor
    for module, both in found.items():
        if len(both) < 2:
            raise ModelUnavailable(f"{folder / WEIGHTS} holds only one of A and B of {module}.")
    if not found:
        raise ModelUnavailable(f"{folder / WEIGHTS} holds nothing.")
    return {module: (both["A"], both["B"]) for module, both in found.items()}


def _require_fit(
    module: str, a: Stored, b: Stored, shape: tuple[int, ...] | None, model: str
) -> None:
    """Checks the shapes of one module.

    Args:
        shape: of the module's weight, outputs first; None where the model has none.

    Raises:
        ModelUnavailable: the adapter is of another model.
    """
    if shape is None:
        raise ModelUnavailable(f"{a.file} changes {module}, which {model} does not have.")
    is_pair = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
    if not is_pair or (b.shape[0], a.shape[1]) != shape:
        raise ModelUnavailable(
            f"{a.file} changes {module} by {list(b.shape)} times {list(a.shape)},"
            f" and that of {model} is {list(shape)}."
        )


def _require_rank(helper: Any, module: str, a: Stored) -> None:
    """Checks that a module has the rank by which vLLM scales it.

    Raises:
        ModelUnavailable: it has another.
    """
    rank = (
        helper.get_rank_and_scaling(module)[0]
        if hasattr(helper, "get_rank_and_scaling")
        else helper.r
    )
    if a.shape[0] != rank:
        raise ModelUnavailable(
            f"{a.file} holds {module} with rank {a.shape[0]}, and by {CONFIG} it is {rank}."
        )
