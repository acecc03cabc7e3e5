"""The server against its own OpenAPI description: a thousand requests made up by schemathesis, no 5xx."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

from midlogit import Pair
from midlogit.models.checkpoint import bundled
from tests.server.conftest import Live, run_server

OPERATIONS = {
    ("POST", "/v1/completions"): 350,
    ("POST", "/v1/chat/completions"): 350,
    ("POST", "/tokenize"): 130,
    ("POST", "/detokenize"): 120,
    ("GET", "/v1/models/{name}"): 50,
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The bundled pair with a context of 32 tokens, so that a request for all of it is soon done."""
    folder = tmp_path_factory.mktemp("pair")
    for side in ("base", "teacher"):
        shutil.copytree(bundled(side), folder / side)
        file = folder / side / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 32}))

    def open_pair() -> Pair:
        return Pair.local(
            folder / "base", folder / "teacher", dtype="float32", device="cpu", max_num_seqs=32
        )

    with run_server(open_pair, max_num_seqs=32) as live:
        yield live


@pytest.mark.parametrize(
    ("method", "path"), list(OPERATIONS), ids=lambda part: str(part).strip("/")
)
def test_no_request_breaks_the_server(short: Live, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{short.url}/openapi.json")
    operation = schema[path][method]
    seen: dict[int, int] = {}

    @given(case=operation.as_strategy())
    @settings(
        max_examples=OPERATIONS[method, path],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def one(case: schemathesis.Case) -> None:
        response = case.call_and_validate(
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
            timeout=120,
        )
        seen[response.status_code] = seen.get(response.status_code, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one()
    print(f"{method} {path}: {seen}")
    assert sum(seen.values()) >= OPERATIONS[method, path] * 0.9
    assert 200 in seen or path == "/v1/models/{name}"
    short.wait_idle()


def test_the_description_names_every_route(short: Live) -> None:
    described = short.http.get("/openapi.json").json()["paths"]
    served = {
        route.path
        for route in __import__("midlogit.server.app", fromlist=["x"])
        .build_app(short.service, lambda: None)
        .routes
    }
    assert set(described) == served - {"/", "/openapi.json"}


def test_folder_is_not_named(short: Live, tmp_path: Path) -> None:
    """A pair opened from folders shows their last names alone."""
    card = short.http.get("/v1/models").json()["data"][0]
    assert (card["base"], card["teacher"]) == ("base", "teacher")
    assert short.service.pair.mixing.base.name not in short.service.redact(
        f"cannot read {short.service.pair.mixing.base.name}"
    )
