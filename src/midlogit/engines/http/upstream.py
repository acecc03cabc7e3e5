"""The servers of one side as the user names them: URLs, model, tokenizer, key; asks no server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from midlogit.engines.http.client import Endpoint, endpoint
from midlogit.errors import InvalidRequest
from midlogit.outputs import Side

SIDES: tuple[Side, ...] = ("base", "teacher")


@dataclass(frozen=True, slots=True)
class Upstream:
    """One or several servers of one model.

    Attributes:
        urls: their OpenAI URLs, ending in /v1; several are replicas.
        model: the name that it is served by; None for the server's first.
        tokenizer: folder or hub id of its tokenizer files; None to use the folder that the server was started with,
            if it is on this machine, else to ask the server.
        api_key: None for MIDLOGIT_BASE_API_KEY or MIDLOGIT_TEACHER_API_KEY of the environment, else OPENAI_API_KEY.
        chat_template: which of the tokenizer's named chat templates to use.
        trust_remote_code: whether to run Python code that comes with `tokenizer`; never that of a folder which only
            the server names.
    """

    urls: str | Sequence[str]
    model: str | None = None
    tokenizer: str | Path | None = None
    api_key: str | None = field(default=None, repr=False)
    chat_template: str | None = None
    trust_remote_code: bool = False

    def endpoints(self, side: str) -> tuple[Endpoint, ...]:
        """The replicas of a side, "base" or "teacher".

        Raises:
            InvalidRequest: no URL, one that is not the URL of a server, or a key that no header can hold.
        """
        key = (
            self.api_key
            or os.environ.get(f"MIDLOGIT_{side.upper()}_API_KEY")
            or os.environ.get("OPENAI_API_KEY")
        )
        urls = (self.urls,) if isinstance(self.urls, str) else tuple(self.urls)
        if not urls:
            raise InvalidRequest(f"There is no URL for the {side}.", "Give one or several.")

        return tuple(endpoint(side, url, key) for url in urls)
