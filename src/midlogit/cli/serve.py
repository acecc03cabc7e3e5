"""`midlogit serve`: turns options into settings; knows which extra the server needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midlogit.cli.options import (
    Base,
    BaseKey,
    BaseModel,
    BaseTemplate,
    BaseTemplateKwargs,
    BaseTokenizer,
    Context,
    Device,
    Dtype,
    Engine,
    MaxNumSeqs,
    Memory,
    Speculation,
    Teacher,
    TeacherKey,
    TeacherModel,
    TeacherTemplate,
    TeacherTokenizer,
    TemplateKwargs,
    TopK,
    Trust,
)
from midlogit.errors import InvalidRequest
from midlogit.extras import require

if TYPE_CHECKING:
    from midlogit.cli.loading import PairOptions


def serve(
    base: Base = None,
    teacher: Teacher = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MIDLOGIT_API_KEY",
            show_envvar=True,
            help="An API key that the server accepts; may be repeated.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Preset of requests that name none: balanced; with --train, rollout."),
    ] = None,
    base_chat_template: BaseTemplate = None,
    teacher_chat_template: TeacherTemplate = None,
    chat_template_kwargs: TemplateKwargs = None,
    base_chat_template_kwargs: BaseTemplateKwargs = None,
    max_num_seqs: MaxNumSeqs = None,
    max_queued: Annotated[
        int | None,
        typer.Option(
            help="Most sequences that wait; beyond them requests get 429. 256; with --train no limit."
        ),
    ] = None,
    max_completions: Annotated[
        int, typer.Option(help="Most completions of one request (prompts times n).")
    ] = 16_384,
    max_body_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 8 * 2**20,
    max_connections: Annotated[
        int,
        typer.Option(
            help="Most open connections; fewer where the limit of open files (ulimit -n) is lower."
        ),
    ] = 1000,
    train: Annotated[
        bool,
        typer.Option(
            "--train", help="Let a trainer change the base's weights, as of vLLM servers."
        ),
    ] = False,
    weights_root: Annotated[
        Path | None,
        typer.Option(help="Folder below which a trainer leaves weights; without it, NCCL."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A site whose pages may call the server (CORS); may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name by which requests may call a local server without keys; may be repeated."
        ),
    ] = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    engine: Engine = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    gpu_memory_utilization: Memory = 0.9,
    max_model_len: Context = None,
    speculation: Speculation = "auto",
    top_k: TopK = "20",
    base_model: BaseModel = None,
    teacher_model: TeacherModel = None,
    base_tokenizer: BaseTokenizer = None,
    teacher_tokenizer: TeacherTokenizer = None,
    base_api_key: BaseKey = None,
    teacher_api_key: TeacherKey = None,
) -> None:
    """Serve q* as one model behind an OpenAI-compatible API, with a live page at /."""
    from midlogit.cli.loading import (
        InProcess,
        PairOptions,
        parse_speculation,
        parse_template_kwargs,
        upstream,
    )
    from midlogit.params import DEFAULT_PRESET

    options = PairOptions(
        base,
        teacher,
        (
            upstream(
                base,
                base_model,
                base_tokenizer,
                base_api_key,
                base_chat_template,
                trust_remote_code,
            ),
            upstream(
                teacher,
                teacher_model,
                teacher_tokenizer,
                teacher_api_key,
                teacher_chat_template,
                trust_remote_code,
            ),
        ),
        InProcess(
            engine,
            device,
            dtype,
            gpu_memory_utilization,
            max_model_len,
            "nccl" if train and weights_root is None else None,
        ),
        top_k,
        parse_speculation(speculation),
        max_num_seqs,
    )
    _run_serve(
        options,
        chat_template_kwargs=parse_template_kwargs(chat_template_kwargs, base_chat_template_kwargs),
        log_format=log_format,
        host=host.strip("[]"),
        port=port,
        api_keys=tuple(api_key or ()),
        preset=preset or ("rollout" if train else DEFAULT_PRESET),
        max_queued=256 if max_queued is None and not train else max_queued,
        max_completions=max_completions,
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        train=train,
        weights_root=weights_root,
        allow_origins=tuple(allow_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
    )


def _run_serve(options: PairOptions, *, log_format: str, **settings: Any) -> None:
    """Serves until it is told to stop; `settings` are those of ServerSettings.

    Raises:
        MidlogitError: as `midlogit.server.serve.serve` and `open_pair`.
    """
    for module in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        require(module, "server")

    from midlogit.cli.loading import open_pair
    from midlogit.server.serve import serve
    from midlogit.server.settings import ServerSettings

    if log_format not in ("text", "json"):
        raise InvalidRequest(f"Unknown log format {log_format!r}.", "Use text or json.")

    chosen = ServerSettings(json_logs=log_format == "json", max_num_seqs=options.slots, **settings)
    serve(chosen, lambda: open_pair(options))
