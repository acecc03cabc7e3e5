"""The errors that clients receive, in OpenAI's form, with one status each; knows no route.

Every failure of a request becomes an ApiError; `from_midlogit` maps the library's errors to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from midlogit.errors import (
    InvalidField,
    InvalidRequest,
    MidlogitError,
    PromptTooLong,
    WeightMismatch,
)

MOST_ECHOED = 200  # characters of a message, which may hold what a client has sent
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error body.

    Attributes:
        status: of the response.
        code: short name of the kind of error, as OpenAI's clients read it; also the `kind` of the failure metric.
        hint: what to do, in words of the server's own.
        param: the field of the body that is at fault. headers: of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        hint: str = "",
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint
        self.param = param
        self.headers = dict(headers or {})

    def told(self, redact: Callable[[str], str]) -> dict[str, Any]:
        """The body, without secrets and without more of the request than tells what is wrong."""
        kind = (
            "server_error"
            if self.status >= 500
            else TYPES.get(self.status, "invalid_request_error")
        )
        message = f"{_clipped(redact(self.message))} {self.hint}".rstrip()
        param = None if self.param is None else _clipped(redact(self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_ECHOED else f"{text[:MOST_ECHOED]}…"


def from_midlogit(error: MidlogitError) -> ApiError:
    """The library's error as the client sees it; details only of the client's own mistakes."""
    message, hint = error.args[0], error.hint
    if isinstance(error, PromptTooLong):
        return ApiError(400, "context_length_exceeded", message, hint)
    if isinstance(error, WeightMismatch):
        return ApiError(400, "weight_mismatch", message, hint)
    if isinstance(error, InvalidRequest):
        return ApiError(400, "invalid_request", message, hint)
    return ApiError(500, "engine_failure", "The engine failed; the server's log says how.")


def from_validation(error: ValidationError) -> ApiError:
    """The first mistake in a body, with its field; of a field with several forms, the form that fits best."""
    found = [(_path(e), e) for e in error.errors(include_url=False, include_input=False)]
    path, deepest = max(found, key=lambda entry: len(entry[0]))
    where = field_path(path)
    cause = deepest.get("ctx", {}).get("error")
    if isinstance(cause, InvalidField) and cause.unsupported:
        return ApiError(400, "unsupported_option", cause.args[0], cause.hint, param=where)
    told, hint = f"{deepest['msg']}.", ""
    if isinstance(cause, InvalidField):
        told, hint = cause.args[0], cause.hint
    place = f"{where:.80}: " if where else ""
    return ApiError(
        422, "invalid_type", f"The body does not fit: {place}{told}", hint, param=where or None
    )


def _path(found: ErrorDetails) -> tuple[str | int, ...]:
    """The location of one error; midlogit's own errors add the place inside the value."""
    cause = found.get("ctx", {}).get("error")
    inner = cause.field.split(".") if isinstance(cause, InvalidField) and cause.field else []
    return *found["loc"], *(int(part) if part.isdecimal() else part for part in inner)


def field_path(loc: Sequence[str | int]) -> str:
    """`messages.0.content` for pydantic's location, without the names of union members."""
    return ".".join(
        str(part)
        for part in loc
        if isinstance(part, int) or (part.isidentifier() and part not in UNIONS)
    )


UNIONS = {"str", "int", "Message"}
