"""From two model folders to a vLLM engine in this process; knows the order of the checks, imports torch after them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.engines.draft_length import SpeculationOption
from midlogit.engines.vllm.adapters import PLAIN, Adapter
from midlogit.engines.vllm.devices import require_sharable
from midlogit.engines.vllm.options import (
    SIDES,
    Options,
    draft_length,
    options_of_sides,
    require_taken,
    require_vllm,
    supported_speculation,
)
from midlogit.errors import InvalidRequest, ModelUnavailable
from midlogit.extras import require
from midlogit.models.checkpoint import Checkpoint, TemplateNames, open_checkpoints
from midlogit.models.fit import require_fit
from midlogit.models.mixing import Mixing
from midlogit.models.weights import SINGLE, at_revision

if TYPE_CHECKING:
    from midlogit.engines.vllm.engine import VllmEngine


def open_pair(
    base: str | Path | None,
    teacher: str | Path | None,
    *,
    dtype: str,
    gpu_memory_utilization: float,
    kv_cache_memory_bytes: tuple[int, int] | None,
    max_num_seqs: int,
    max_model_len: int | None,
    speculation: SpeculationOption,
    chat_template: TemplateNames,
    trust_remote_code: bool,
    loras: tuple[str | Path | None, str | Path | None],
    tensor_parallel_size: int,
    options: Options,
    base_args: Options,
    teacher_args: Options,
) -> tuple[Mixing, VllmEngine]:
    """See `Pair.vllm`."""
    if max_num_seqs < 1:
        raise InvalidRequest(f"max_num_seqs is {max_num_seqs}.", "It must be at least 1.")
    if not 0 < gpu_memory_utilization <= 1:
        raise InvalidRequest(
            f"gpu_memory_utilization is {gpu_memory_utilization}.",
            "It is a share of the device, in (0, 1].",
        )
    draft_length(speculation)

    base = at_revision(base, base_args.get("revision", options.get("revision")))
    teacher = at_revision(teacher, teacher_args.get("revision", options.get("revision")))
    opened = open_checkpoints(base, teacher, chat_template, trust_remote_code=trust_remote_code)
    checkpoints = _limit_context(opened, max_model_len)
    torch = require("torch", "local")
    for checkpoint in checkpoints:
        _require_one_file(Path(checkpoint.name))
        require_fit(checkpoint)
    mixing = Mixing(*checkpoints)
    mixing.require_mixable()
    require_sharable(tensor_parallel_size, checkpoints)

    version = require_vllm()
    of_sides = options_of_sides(options, base_args, teacher_args)
    supported = supported_speculation(speculation, version, on_gpu=torch.cuda.is_available())

    from midlogit.engines.vllm.engine import VllmEngine
    from midlogit.engines.vllm.memory import device_memory, split_device
    from midlogit.engines.vllm.process import Opening
    from midlogit.engines.vllm.ranks import Ranks, free_port

    limits: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
    }
    adapters = _open_adapters(loras, checkpoints)
    if adapters[0] is not None and "weight_transfer_config" in of_sides[0]:
        raise InvalidRequest("A base with an adapter cannot receive weights.", PLAIN)
    for side, checkpoint, own, adapter in zip(SIDES, checkpoints, of_sides, adapters, strict=True):
        further = {} if adapter is None else adapter.options
        given = {"trust_remote_code": trust_remote_code, **limits, **own, **further}
        require_taken(side, checkpoint.name, given)

    ranks = Ranks(tensor_parallel_size)
    try:
        shares = split_device(
            *checkpoints,
            utilization=gpu_memory_utilization,
            given=kv_cache_memory_bytes,
            drafts=max(draft_length(supported).choices, default=0),
            devices=[device_memory(), *ranks.memory()],
            cache_dtypes=(
                of_sides[0].get("kv_cache_dtype", "auto"),
                of_sides[1].get("kv_cache_dtype", "auto"),
            ),
            adapter_weights=(_weights_of(adapters[0]), _weights_of(adapters[1])),
            **limits,
        )
        opening = Opening(
            (checkpoints[0].name, checkpoints[1].name),
            shares,
            [{"trust_remote_code": trust_remote_code, **own} for own in of_sides],
            adapters,
            limits,
            supported,
            mixing.alignment.size,
            ranks.size,
            free_port(),
        )
        cores, decider, lengths = ranks.open(opening)
    except BaseException:
        ranks.kill()
        raise
    engine = VllmEngine(cores, checkpoints[0], decider, lengths, max_num_seqs, ranks)
    engine.start()
    return mixing, engine


def _open_adapters(
    loras: tuple[str | Path | None, str | Path | None], checkpoints: tuple[Checkpoint, Checkpoint]
) -> tuple[Adapter | None, Adapter | None]:
    """The adapters of (base, teacher), each checked against its model."""
    (base_lora, teacher_lora), (base, teacher) = loras, checkpoints
    return (
        None if base_lora is None else Adapter.open(base_lora, base),
        None if teacher_lora is None else Adapter.open(teacher_lora, teacher),
    )


def _weights_of(adapter: Adapter | None) -> int:
    return 0 if adapter is None else adapter.weights


def _require_one_file(folder: Path) -> None:
    """Refuses files beside a single file of weights: vLLM would read them all, in no order.

    Raises:
        ModelUnavailable: names one.
    """
    others = sorted(f.name for f in folder.glob("*.safetensors") if f.name != SINGLE)
    if others and (folder / SINGLE).is_file():
        raise ModelUnavailable(
            f"{folder} holds {others[0]} beside {SINGLE}, and vLLM reads both.",
            "Remove one of them.",
        )


def _limit_context(
    checkpoints: tuple[Checkpoint, Checkpoint], max_model_len: int | None
) -> tuple[Checkpoint, Checkpoint]:
    """Limits both models to `max_model_len` tokens.

    Raises:
        InvalidRequest: a model does not take that many.
    """
    for side, checkpoint in zip(("base", "teacher"), checkpoints, strict=True):
        if max_model_len is not None and not 1 <= max_model_len <= checkpoint.max_context:
            raise InvalidRequest(
                f"max_model_len is {max_model_len}.",
                f"The {side} {checkpoint.name} takes 1 to {checkpoint.max_context} tokens.",
            )

    base, teacher = checkpoints
    if max_model_len is None:
        return base, teacher
    return replace(base, max_context=max_model_len), replace(teacher, max_context=max_model_len)
