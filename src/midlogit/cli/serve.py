"""`midlogit serve`: turns options into settings; knows which extra the server needs."""

from __future__ import annotations

from typing import Any

from midlogit.cli.loading import PairOptions, open_pair
from midlogit.errors import InvalidRequest
from midlogit.extras import require


def run_serve(options: PairOptions, *, log_format: str, **settings: Any) -> None:
    """Serves until it is told to stop; `settings` are those of ServerSettings.

    Raises:
        MidlogitError: as `midlogit.server.serve.serve` and `open_pair`.
    """
    for module in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        require(module, "server")

    from midlogit.server.serve import serve
    from midlogit.server.settings import ServerSettings

    if log_format not in ("text", "json"):
        raise InvalidRequest(f"Unknown log format {log_format!r}.", "Use text or json.")

    chosen = ServerSettings(json_logs=log_format == "json", max_num_seqs=options.slots, **settings)
    serve(chosen, lambda: open_pair(options))
