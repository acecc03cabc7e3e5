"""The server's OpenAPI description, generated from the types of its bodies; knows routes and statuses, no handler."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from midlogit import __version__
from midlogit.server.wire import requests, responses

POSTS: tuple[tuple[str, type[requests.Body], Any, str], ...] = (
    (
        "/v1/completions",
        requests.CompletionBody,
        responses.CompletionResponse,
        "Complete or score text.",
    ),
    ("/v1/chat/completions", requests.ChatBody, responses.ChatResponse, "Answer chat messages."),
    (
        "/tokenize",
        requests.TokenizeBody,
        responses.Tokenized,
        "Token ids as the teacher reads them.",
    ),
    ("/detokenize", requests.DetokenizeBody, responses.Detokenized, "The text of token ids."),
)
GETS: tuple[tuple[str, Any, str], ...] = (
    ("/v1/models", responses.ModelList, "The one model served."),
    ("/v1/models/{name}", responses.ModelCard, "The model's card."),
    (
        "/tokenizer_info",
        responses.TokenizerInfo,
        "Special tokens and chat template of the teacher.",
    ),
    ("/version", responses.Version, "The server's version."),
    ("/health", None, "Whether requests can be served."),
    ("/metrics", None, "Metrics for Prometheus."),
)
ERRORS = {
    "400": "A request that cannot be honoured, or malformed JSON.",
    "401": "No valid key.",
    "403": "The request calls the server by another's name.",
    "404": "No such model.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "422": "A field of wrong type or out of range.",
    "429": "Too many requests wait; Retry-After says when to try again.",
    "500": "The server failed.",
    "503": "The models are loading, the server is stopping, or it holds too many large bodies.",
}
EVENT = {
    "type": "object",
    "description": "With stream: true. Each event's data is JSON, a piece of the answer; the last one's is [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
READING_ERRORS = ("401", "403", "404", "500", "503")


@lru_cache(maxsize=1)
def description() -> dict[str, Any]:
    """The document served at /openapi.json."""
    reference = "#/components/schemas/{model}"
    _, bodies = models_json_schema(
        [(kind, "validation") for _, kind, _, _ in POSTS], ref_template=reference
    )
    answers: list[tuple[int, Literal["serialization"], TypeAdapter[Any]]] = [
        (n, "serialization", TypeAdapter(kind)) for n, kind in enumerate(_answers())
    ]
    shapes, answer_definitions = TypeAdapter.json_schemas(answers, ref_template=reference)
    schemas = {**bodies["$defs"], **answer_definitions.get("$defs", {})}
    shape_of = {kind: shapes[n, "serialization"] for n, kind in enumerate(_answers())}

    paths: dict[str, Any] = {}
    for path, body, answer, summary in POSTS:
        paths[path] = _post(path, body, answer, summary, shape_of, reference)
    for path, answer, summary in GETS:
        paths[path] = _get(path, answer, summary, shape_of)

    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]

    return {
        "openapi": "3.1.0",
        "info": {
            "title": "midlogit",
            "version": __version__,
            "description": "q* of two models as one model.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(
    path: str, body: Any, answer: Any, summary: str, shape_of: dict[Any, Any], reference: str
) -> dict[str, Any]:
    """The description of an endpoint that takes a body."""
    content: dict[str, Any] = {"application/json": {"schema": shape_of[answer]}}
    if issubclass(body, requests.Sampling):
        content["text/event-stream"] = {"schema": EVENT}

    schema = {"$ref": reference.format(model=body.__name__)}
    return {
        "post": {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_"),
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {
                "200": {"description": "Done.", "content": content},
                **_errors(shape_of, tuple(ERRORS)),
            },
            "security": [{}, {"key": []}],
        }
    }


def _get(path: str, answer: Any, summary: str, shape_of: dict[Any, Any]) -> dict[str, Any]:
    """The description of an endpoint without a body."""
    media = "text/plain" if path == "/metrics" else "application/json"
    shown = {"content": {media: {"schema": shape_of[answer] if answer else {"type": "string"}}}}
    done = {"description": "Done.", **({} if path == "/health" else shown)}
    return {
        "get": {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_"),
            "responses": {"200": done, **_errors(shape_of, READING_ERRORS)},
            "security": [{}, {"key": []}],
        }
    }


def _answers() -> list[Any]:
    return [
        *(answer for _, _, answer, _ in POSTS),
        *(answer for _, answer, _ in GETS if answer),
        responses.ErrorBody,
    ]


def _errors(shape_of: dict[Any, Any], statuses: tuple[str, ...]) -> dict[str, Any]:
    content = {"application/json": {"schema": shape_of[responses.ErrorBody]}}
    return {status: {"description": ERRORS[status], "content": content} for status in statuses}
