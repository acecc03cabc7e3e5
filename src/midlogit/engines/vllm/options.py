"""Which vLLM and which of its options work here; knows versions and names of options, no model and no tensor."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from midlogit.engines.draft_length import DraftLength, SpeculationOption
from midlogit.errors import InvalidRequest, UnsupportedVersion, first_line
from midlogit.extras import require

# Minor versions. The tests run the newest; docs/vllm.md says what ran on the oldest.
OLDEST, NEWEST = (0, 24), (0, 33)

# The environment chooses model runner V2 from OLDEST_V2 on. Versions after NEWEST_V1 have no other.
OLDEST_V2, NEWEST_V1 = (0, 32), (0, 33)
V2 = "VLLM_USE_V2_MODEL_RUNNER"

# γ that "auto" chooses from. The teacher has CUDA graphs for each.
DRAFT_LENGTHS = (0, 2, 3, 4, 5, 6)

# Options of vLLM that are refused, with the reason.
OWN = "midlogit sets it: both engines are stepped by hand, in lock-step"
PARALLEL = "use tensor_parallel_size for models that need several devices, and several pairs for more speed"
NAMED = "midlogit reads the model's files, too; name a folder that holds all of them"
REFUSED = {
    "async_scheduling": OWN,
    "scheduler_cls": OWN,
    "speculative_config": "vLLM would verify drafts against one of the two models; q* has a sampler of its own",
    "structured_outputs_config": "its masks are for one model's logits; use stop, stop_token_ids or special_token_ids",
    "logits_processors": "they change the logits of one of the two models alone",
    "kv_transfer_config": "blocks of the two caches must be computed here",
    "tensor_parallel_size": "give it to the pair: the same devices share both models",
    "pipeline_parallel_size": PARALLEL,
    "data_parallel_size": PARALLEL,
    "device": "rank N of a pair takes the N-th visible device",
    "distributed_executor_backend": OWN,
    "skip_tokenizer_init": OWN,
    "scheduling_policy": "requests must be taken in the same order on both sides",
    "gpu_memory_utilization": "give it to the pair: it is split between the two",
    "kv_cache_memory_bytes": "give it to the pair, as (base, teacher)",
    "model": NAMED,
    "tokenizer": NAMED,
    "tokenizer_revision": NAMED,
    "hf_config_path": NAMED,
}
LORA = "adapters are given as base_lora and teacher_lora, and these options follow from them"
SIDES = ("base", "teacher")

# Keywords of the pair: what both models must have in common.
SHARED = ("dtype", "max_num_seqs", "max_model_len", "trust_remote_code")

Options = Mapping[str, Any]


def require_vllm() -> str:
    """Returns the version of the installed vLLM, and sets the environment that it needs here.

    Raises:
        MissingExtra: vLLM is not installed.
        UnsupportedVersion: the version is not a known one.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # vLLM reads it when it is imported: engine cores in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    version = str(require("vllm", "vllm").__version__)
    if not OLDEST <= _numbers(version) <= NEWEST:
        known = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise UnsupportedVersion(
            f"vLLM {version} is installed; the in-process engine knows {known}.",
            "Run: pip install 'vllm==0.32.*'",
        )
    if os.environ.setdefault(V2, str(int(_numbers(version) > NEWEST_V1))) != "0":
        _require_v2(version)
    return version


def _require_v2(version: str) -> None:
    """Refuses model runner V2 where it cannot run.

    Raises:
        UnsupportedVersion: it is another than the known one, or has no Triton.
    """
    from vllm.triton_utils import HAS_TRITON

    if _numbers(version) < OLDEST_V2:
        raise UnsupportedVersion(
            f"{V2} asks for model runner V2, which is not known of vLLM {version}.",
            f"Set {V2}=0, or run: pip install 'vllm==0.32.*'",
        )
    if not HAS_TRITON:
        raise UnsupportedVersion(
            f"{V2} asks for model runner V2, which needs Triton; vLLM {version} cannot use it here.",
            f"Set {V2}=0.",
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The major and minor number of a version."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def why_unusable() -> str | None:
    """Why "auto" does not take vLLM; None where it does. Imports torch, but not vLLM."""
    try:
        version = installed_version("vllm")
    except PackageNotFoundError:
        return "vLLM is not installed"
    if not OLDEST <= _numbers(version) <= NEWEST:
        return f"vLLM {version} is not a known one"
    if not require("torch", "local").cuda.is_available():
        return "there is no GPU"
    return None


def options_of_sides(both: Options, base: Options, teacher: Options) -> tuple[Options, Options]:
    """The options of (base, teacher): those for both, and each side's own in their place.

    Raises:
        InvalidRequest: an option that two engines in lock-step cannot honour, that they cannot have apart, or that
            vLLM does not have.
    """
    _require_known(both)
    for side, own in zip(SIDES, (base, teacher), strict=True):
        for name in SHARED:
            if name in own:
                raise InvalidRequest(
                    f"{name} is given in {side}_args, and both models must have the same.",
                    "Give it to the pair.",
                )
        _require_known(own)
    if "weight_transfer_config" in teacher:
        raise InvalidRequest(
            "weight_transfer_config is given in teacher_args, and only the base's weights change.",
            "Give it in base_args.",
        )
    of_teacher = {k: v for k, v in both.items() if k != "weight_transfer_config"}
    sides = {**both, **base}, {**of_teacher, **teacher}
    for options in sides:
        options.pop("revision", None)  # the models are folders of that revision by now
    return sides


def _require_known(options: Options) -> None:
    """Checks the names of options that are passed on to vLLM's EngineArgs.

    Raises:
        InvalidRequest: one that cannot be honoured, or that vLLM does not have.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = EngineArgs.__dataclass_fields__
    for name in options:
        if name in REFUSED or (name in known and "lora" in name):
            reason = REFUSED.get(name, LORA)
            raise InvalidRequest(f"The vLLM option {name} cannot be used here: {reason}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"Use the names of vLLM's EngineArgs{', such as ' * bool(close)}{', '.join(close)}."
            )
            raise InvalidRequest(f"vLLM has no option {name!r}.", hint)


def require_taken(side: str, model: str, options: Options) -> str:
    """Checks values: makes vLLM's configuration of one side, which loads nothing.

    Returns:
        The type that the model computes in, such as "bfloat16".

    Raises:
        InvalidRequest: vLLM refuses a value, or values together; in its own words.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    try:
        config = EngineArgs(model=model, **options).create_engine_config(UsageContext.LLM_CLASS)
    except Exception as error:  # each configuration of vLLM's checks in its own way
        raise InvalidRequest(f"vLLM refuses options of the {side}: {_words(error)}") from error
    return str(config.model_config.dtype).removeprefix("torch.")


def _words(error: Exception) -> str:
    """What an error says in one line; of pydantic's the first field and what it should be."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    return (
        f"{field}: {first['msg']}." if field else f"{first['msg'].removeprefix('Value error, ')}."
    )


def draft_length(speculation: SpeculationOption) -> DraftLength:
    """Chooses γ for a pair of vLLM cores.

    Raises:
        InvalidRequest: neither "auto", "off" nor a possible number of drafts.
    """
    return DraftLength(speculation, DRAFT_LENGTHS, reuses_bonus_row=True)


def supported_speculation(
    wanted: SpeculationOption, version: str, on_gpu: bool
) -> SpeculationOption:
    """Returns `wanted`, or "off" where this vLLM cannot verify drafts and the choice was left to "auto".

    The CPU kernels of vLLM 0.24 lack an argument that its own warm-up passes to them.

    Raises:
        InvalidRequest: a number of drafts was given, and this vLLM cannot verify any.
    """
    lengths = draft_length(wanted)
    if not lengths.choices or on_gpu or not version.startswith("0.24."):
        return wanted
    if lengths.fixed:
        raise InvalidRequest(
            f"vLLM {version} cannot read drafts on a CPU.", "Use speculation off, or a newer vLLM."
        )
    return "off"
