"""The options by which a command names a pair and its engine; knows their names and defaults, opens nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_type_hints

from midlogit.cli.options import (
    Base,
    BaseArgs,
    BaseKey,
    BaseLora,
    BaseModel,
    BaseTemplate,
    BaseTokenizer,
    BatchedTokens,
    CacheDtype,
    Context,
    Device,
    Dtype,
    Eager,
    Engine,
    EngineArgs,
    LoadFormat,
    MaxNumSeqs,
    Memory,
    PrefixCaching,
    Quantization,
    Revision,
    Speculation,
    Teacher,
    TeacherArgs,
    TeacherKey,
    TeacherLora,
    TeacherModel,
    TeacherTemplate,
    TeacherTokenizer,
    TensorParallel,
    TopK,
    Trust,
)

if TYPE_CHECKING:
    from midlogit.cli.loading import PairOptions

NAMES = ("base", "teacher")  # the options that stand in the place of `pair`; the others come last


def takes_pair(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of a pair in the place of its parameter `pair`, a `PairOptions`."""
    shared = _parameters(pair_options)
    parameters: list[inspect.Parameter] = []
    for name, parameter in _parameters(command).items():
        parameters += [shared[name] for name in NAMES] if name == "pair" else [parameter]
    parameters += [parameter for name, parameter in shared.items() if name not in NAMES]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        pair = pair_options(**{name: given.pop(name) for name in shared})
        return command(pair=pair, **given)

    # Typer reads both.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name, by keyword alone, with their types as objects."""
    hints = get_type_hints(function, localns={"PairOptions": object}, include_extras=True)
    return {
        name: parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
    }


def pair_options(
    base: Base = None,
    teacher: Teacher = None,
    base_chat_template: BaseTemplate = None,
    teacher_chat_template: TeacherTemplate = None,
    engine: Engine = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    max_num_seqs: MaxNumSeqs = None,
    gpu_memory_utilization: Memory = 0.9,
    max_model_len: Context = None,
    tensor_parallel_size: TensorParallel = None,
    quantization: Quantization = None,
    kv_cache_dtype: CacheDtype = None,
    enforce_eager: Eager = None,
    load_format: LoadFormat = None,
    revision: Revision = None,
    max_num_batched_tokens: BatchedTokens = None,
    enable_prefix_caching: PrefixCaching = None,
    base_lora: BaseLora = None,
    teacher_lora: TeacherLora = None,
    engine_arg: EngineArgs = None,
    base_arg: BaseArgs = None,
    teacher_arg: TeacherArgs = None,
    speculation: Speculation = "auto",
    top_k: TopK = "20",
    base_model: BaseModel = None,
    teacher_model: TeacherModel = None,
    base_tokenizer: BaseTokenizer = None,
    teacher_tokenizer: TeacherTokenizer = None,
    base_api_key: BaseKey = None,
    teacher_api_key: TeacherKey = None,
) -> PairOptions:
    """The pair that the options of a command name.

    Raises:
        InvalidRequest: an option that cannot be honoured.
    """
    from midlogit.cli.loading import (
        InProcess,
        PairOptions,
        parse_engine_args,
        parse_speculation,
        upstream,
    )

    common = {
        "base_lora": base_lora,
        "teacher_lora": teacher_lora,
        "tensor_parallel_size": tensor_parallel_size,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "enforce_eager": enforce_eager,
        "load_format": load_format,
        "revision": revision,
        "max_num_batched_tokens": max_num_batched_tokens,
        "enable_prefix_caching": enable_prefix_caching,
    }
    engine_args = parse_engine_args(common, engine_arg, base_arg, teacher_arg)

    upstreams = (
        upstream(
            base, base_model, base_tokenizer, base_api_key, base_chat_template, trust_remote_code
        ),
        upstream(
            teacher,
            teacher_model,
            teacher_tokenizer,
            teacher_api_key,
            teacher_chat_template,
            trust_remote_code,
        ),
    )
    return PairOptions(
        base,
        teacher,
        upstreams,
        InProcess(engine, device, dtype, gpu_memory_utilization, max_model_len, engine_args),
        top_k,
        parse_speculation(speculation),
        max_num_seqs,
    )
