"""From two model folders to a vLLM engine in this process; knows the order of the checks, imports torch after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.engines.draft_length import SpeculationOption
from midlogit.engines.vllm.adapters import MERGE, PLAIN, Adapter
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
from midlogit.kinds import require_count, require_kind
from midlogit.models.checkpoint import Checkpoint, TemplateNames, open_checkpoints
from midlogit.models.fit import require_fit
from midlogit.models.mixing import Mixing
from midlogit.models.weights import SINGLE, at_revision

if TYPE_CHECKING:
    from midlogit.engines.vllm.engine import VllmEngine
    from midlogit.engines.vllm.memory import Split
    from midlogit.engines.vllm.process import Opening


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
    _require_in_range(max_num_seqs, gpu_memory_utilization, kv_cache_memory_bytes)
    draft_length(speculation)

    given = [{**options, **own} for own in (base_args, teacher_args)]
    base = at_revision(base, given[0].get("revision"))
    teacher = at_revision(teacher, given[1].get("revision"))
    opened = open_checkpoints(base, teacher, chat_template, trust_remote_code=trust_remote_code)
    checkpoints = _limit_context(opened, max_model_len)
    mixing = _require_usable(checkpoints, [own.get("load_format") for own in given])
    require_sharable(tensor_parallel_size, checkpoints)

    version = require_vllm()
    sides = options_of_sides(options, base_args, teacher_args)
    of_sides = [{"trust_remote_code": trust_remote_code, **own} for own in sides]
    supported = supported_speculation(speculation, version, on_gpu=_has_gpu())
    adapters = _open_adapters(loras, checkpoints)

    from midlogit.engines.vllm.memory import split_device
    from midlogit.engines.vllm.process import Opening

    limits: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
    }
    _require_taken(checkpoints, of_sides, adapters, limits)

    divide = partial(
        split_device,
        *checkpoints,
        **limits,
        utilization=gpu_memory_utilization,
        given=kv_cache_memory_bytes,
        drafts=max(draft_length(supported).choices, default=0),
        cache_dtypes=tuple(own.get("kv_cache_dtype", "auto") for own in of_sides),
        adapter_weights=(_weights_of(adapters[0]), _weights_of(adapters[1])),
    )
    opening = partial(
        Opening,
        models=(checkpoints[0].name, checkpoints[1].name),
        options=of_sides,
        adapters=adapters,
        limits=limits,
        speculation=supported,
        vocabulary=mixing.alignment.size,
        size=tensor_parallel_size,
    )
    return mixing, _start(checkpoints[0], divide, opening, tensor_parallel_size, max_num_seqs)


def _start(
    base: Checkpoint,
    divide: Callable[..., Split],
    opening: Callable[..., Opening],
    size: int,
    max_num_seqs: int,
) -> VllmEngine:
    """Starts all ranks, then the engine on this one.

    Args:
        divide: gives the shares of the models, of the devices of all ranks.
        opening: makes what the ranks need, of the shares and a port.
        size: number of ranks.
    """
    from midlogit.engines.vllm.engine import VllmEngine
    from midlogit.engines.vllm.memory import device_memory
    from midlogit.engines.vllm.ranks import Ranks, free_port

    ranks = Ranks(size)
    try:
        shares = divide(devices=[device_memory(), *ranks.memory()])
        opened = ranks.open(opening(shares=shares, port=free_port()))
    except BaseException:
        ranks.kill()
        raise
    cores, decider, lengths = opened
    engine = VllmEngine(cores, base, decider, lengths, max_num_seqs, ranks)
    engine.start()
    return engine


def _has_gpu() -> bool:
    return bool(require("torch", "local").cuda.is_available())


def _require_usable(
    checkpoints: tuple[Checkpoint, Checkpoint], load_formats: Sequence[str | None]
) -> Mixing:
    """What the two models make together, once the files that are to be read are checked."""
    require("torch", "local")
    for checkpoint, load_format in zip(checkpoints, load_formats, strict=True):
        if load_format != "dummy":
            _require_one_file(Path(checkpoint.name))
            require_fit(checkpoint)
    mixing = Mixing(*checkpoints)
    mixing.require_mixable()
    return mixing


def _require_in_range(
    max_num_seqs: int, gpu_memory_utilization: float, kv_cache_memory_bytes: tuple[int, int] | None
) -> None:
    require_count(max_num_seqs=max_num_seqs)
    require_kind("float", gpu_memory_utilization=gpu_memory_utilization)
    if not 0 < gpu_memory_utilization <= 1:
        raise InvalidRequest(
            f"gpu_memory_utilization is {gpu_memory_utilization}.",
            "It is a share of the device, in (0, 1].",
        )
    match kv_cache_memory_bytes:
        case None | [int(), int()]:
            pass
        case _:
            raise InvalidRequest(
                f"kv_cache_memory_bytes is {kv_cache_memory_bytes!r}.",
                "Give the sizes of both KV caches in bytes, as (base, teacher).",
            )


def _open_adapters(
    loras: tuple[str | Path | None, str | Path | None], checkpoints: tuple[Checkpoint, Checkpoint]
) -> tuple[Adapter | None, Adapter | None]:
    """The adapters of (base, teacher), each checked against its model."""
    (base_lora, teacher_lora), (base, teacher) = loras, checkpoints
    return (
        None if base_lora is None else Adapter.open(base_lora, base),
        None if teacher_lora is None else Adapter.open(teacher_lora, teacher),
    )


def _require_taken(
    checkpoints: tuple[Checkpoint, Checkpoint],
    of_sides: Sequence[Options],
    adapters: tuple[Adapter | None, Adapter | None],
    limits: Options,
) -> None:
    """Has vLLM check the options of each side."""
    if adapters[0] is not None and "weight_transfer_config" in of_sides[0]:
        raise InvalidRequest("A base with an adapter cannot receive weights.", PLAIN)
    for side, checkpoint, own, adapter in zip(SIDES, checkpoints, of_sides, adapters, strict=True):
        further = {} if adapter is None else adapter.options
        dtype = require_taken(side, checkpoint.name, {**limits, **own, **further})
        if adapter is not None and dtype == "float32" and _has_gpu():
            raise InvalidRequest(
                f"vLLM applies adapters on a GPU in bfloat16 and float16 only, and the {side} is in {dtype}.",
                f"Open it with dtype bfloat16 or float16. {MERGE}",
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
    if max_model_len is None:
        return checkpoints

    require_kind("int", max_model_len=max_model_len)
    for side, checkpoint in zip(("base", "teacher"), checkpoints, strict=True):
        if not 1 <= max_model_len <= checkpoint.max_context:
            raise InvalidRequest(
                f"max_model_len is {max_model_len}.",
                f"The {side} {checkpoint.name} takes 1 to {checkpoint.max_context} tokens.",
            )
    base, teacher = checkpoints
    return replace(base, max_context=max_model_len), replace(teacher, max_context=max_model_len)
