"""Which vLLM and which of its options work here; knows versions and names of options, no model and no tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from midlogit.engines.draft_length import DraftLength, SpeculationOption
from midlogit.errors import InvalidRequest, UnsupportedVersion
from midlogit.extras import require

# Minor versions. The tests run the newest; docs/vllm.md says what ran on the oldest.
OLDEST, NEWEST = (0, 24), (0, 32)

# γ that "auto" chooses from. The teacher has CUDA graphs for each.
DRAFT_LENGTHS = (0, 2, 3, 4, 5, 6)

# Options of vLLM that are refused, with the reason.
OWN = "midlogit sets it: both engines are stepped by hand, in lock-step"
PARALLEL = (
    "both models share one process and one device, and vLLM's parallel groups belong to the process"
)
REFUSED = {
    "async_scheduling": OWN,
    "scheduler_cls": OWN,
    "speculative_config": "vLLM would verify drafts against one of the two models; q* has a sampler of its own",
    "structured_outputs_config": "its masks are for one model's logits; use stop, stop_token_ids or special_token_ids",
    "logits_processors": "they change the logits of one of the two models alone",
    "kv_transfer_config": "blocks of the two caches must be computed here",
    "enable_lora": "adapters are chosen for each request of one model; merge the adapter into the weights",
    "tensor_parallel_size": PARALLEL,
    "pipeline_parallel_size": PARALLEL,
    "data_parallel_size": PARALLEL,
    "device": PARALLEL,
    "distributed_executor_backend": OWN,
    "skip_tokenizer_init": OWN,
    "scheduling_policy": "requests must be taken in the same order on both sides",
    "gpu_memory_utilization": "give it to the pair: it is split between the two",
    "kv_cache_memory_bytes": "give it to the pair, as (base, teacher)",
}


def require_vllm() -> str:
    """Returns the version of the installed vLLM, and sets the environment that it needs here.

    Raises:
        MissingExtra: vLLM is not installed.
        UnsupportedVersion: the version is not a known one.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # vLLM reads both when it is imported: engine cores in this process, and the model runner that core.py knows.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"

    version = str(require("vllm", "vllm").__version__)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers <= NEWEST:
        known = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise UnsupportedVersion(
            f"vLLM {version} is installed; the in-process engine knows {known}.",
            "Run: pip install 'vllm==0.32.*'",
        )
    return version


def require_options(options: Mapping[str, Any]) -> None:
    """Checks options that are passed on to vLLM's EngineArgs.

    Raises:
        InvalidRequest: an option that two engines in lock-step cannot honour, or that vLLM does not have.
    """
    from vllm.engine.arg_utils import EngineArgs

    for name in options:
        if name in REFUSED:
            raise InvalidRequest(f"The vLLM option {name} cannot be used here: {REFUSED[name]}.")
        if name not in EngineArgs.__dataclass_fields__:
            raise InvalidRequest(
                f"vLLM has no option {name!r}.", "Use the names of vLLM's EngineArgs."
            )


def draft_length(speculation: SpeculationOption) -> DraftLength:
    """Chooses γ for a pair of vLLM cores.

    Raises:
        InvalidRequest: neither "auto", "off" nor a possible number of drafts.
    """
    return DraftLength(speculation, DRAFT_LENGTHS, reuses_bonus_row=True)


def supported_draft_length(wanted: DraftLength, version: str, on_gpu: bool) -> DraftLength:
    """Returns `wanted`, or lock-step where this vLLM cannot verify drafts and the choice was left to "auto".

    The CPU kernels of vLLM 0.24 lack an argument that its own warm-up passes to them.

    Raises:
        InvalidRequest: a number of drafts was given, and this vLLM cannot verify any.
    """
    if not wanted.choices or on_gpu or not version.startswith("0.24."):
        return wanted
    if wanted.fixed:
        raise InvalidRequest(
            f"vLLM {version} cannot read drafts on a CPU.", "Use speculation off, or a newer vLLM."
        )
    return draft_length("off")
