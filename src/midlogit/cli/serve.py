"""`midlogit serve`: turns options into settings; knows which extra the server needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midlogit.cli.options import BaseTemplateKwargs, TemplateKwargs
from midlogit.cli.pair import takes_pair
from midlogit.errors import InvalidRequest
from midlogit.extras import require

if TYPE_CHECKING:
    from midlogit.cli.loading import PairOptions


@takes_pair
def serve(
    *,
    pair: PairOptions,
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
    chat_template_kwargs: TemplateKwargs = None,
    base_chat_template_kwargs: BaseTemplateKwargs = None,
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
) -> None:
    """Serve q* as one model behind an OpenAI-compatible API, with a live page at /."""
    from midlogit.cli.loading import parse_template_kwargs
    from midlogit.params import DEFAULT_PRESET

    if train and weights_root is None:
        pair = replace(pair, in_process=replace(pair.in_process, weight_transfer="nccl"))
    _run_serve(
        pair,
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

    from midlogit.cli.loading import open_pair, require_usable
    from midlogit.server.serve import serve
    from midlogit.server.settings import ServerSettings

    if log_format not in ("text", "json"):
        raise InvalidRequest(f"Unknown log format {log_format!r}.", "Use text or json.")

    require_usable(options)
    chosen = ServerSettings(json_logs=log_format == "json", max_num_seqs=options.slots, **settings)
    serve(chosen, lambda: open_pair(options))
