"""Requests that cannot be honoured: the right status and OpenAI's error body, and nothing left running."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from midlogit.models.checkpoint import bundled
from tests.server.conftest import Live

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def refused(
    server: Live, status: int, path: str, body: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The error of a request that must end in `status`."""
    response = (
        server.post(path, body, **kwargs) if body is not None else server.http.post(path, **kwargs)
    )
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (
        error["message"] and error["code"] and str(bundled("base").parent) not in error["message"]
    )
    server.wait_idle()
    return error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{'prompt': 1}",
        b'{"prompt": NaN}',
        b"\xff\xfe{}",
        b'{"prompt": "\xc3("}',
        b'{"prompt":"\\ud800"}',
    ],
)
def test_malformed_json_and_invalid_utf8(server: Live, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert (
        refused(server, 400, COMPLETIONS, content=content, headers=headers)["code"]
        == "malformed_json"
    )


def test_deeply_nested_json(server: Live) -> None:
    content = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    refused(server, 400, COMPLETIONS, content=content, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 5},
        {"prompt": {"a": 1}},
        {"prompt": ["a", 1]},
        {"prompt": [1, "a"]},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1.5]},
        {"prompt": [True]},
        {"prompt": [-1]},
        {"prompt": "a", "temperature": -0.1},
        {"prompt": "a", "temperature": "hot"},
        {"prompt": "a", "temperature": 1e-320},
        {"prompt": "a", "max_tokens": -1},
        {"prompt": "a", "max_tokens": 10**30},
        {"prompt": "a", "max_tokens": "many"},
        {"prompt": "a", "n": 0},
        {"prompt": "a", "n": 10**6},
        {"prompt": "a", "stop": ["x"] * 10_000},
        {"prompt": "a", "stop": ""},
        {"prompt": "a", "stop": [1]},
        {"prompt": "a", "logprobs": 21},
        {"prompt": "a", "stream": "yes"},
        {"prompt": "a", "stream_options": {"include_usage": True}},
        {"prompt": "a", "midlogit": {"alpha": 0.5}},
        {"prompt": "a", "midlogit": {"target_top_p": 0}},
        {"prompt": "a", "midlogit": "balanced"},
        {"prompt": "a", "midlogit": {"base_prompt": []}},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_wrong_types_and_ranges(server: Live, fields: dict[str, Any]) -> None:
    refused(server, 422, COMPLETIONS, fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "Hello"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
        {"messages": HELLO, "top_logprobs": 3},
        {"messages": HELLO, "max_tokens": 0},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_wrong_chats(server: Live, fields: dict[str, Any]) -> None:
    refused(server, 422, CHAT, fields)
    refused(server, 422, CHAT, [fields])


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"1": 5}},
        {"frequency_penalty": 0.5},
        {"top_p": 0.9},
        {"use_beam_search": True},
        {"best_of": 4},
        {"reasoning_effort": "high"},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured(server: Live, fields: dict[str, Any]) -> None:
    error = refused(server, 400, CHAT, {"messages": HELLO, "max_tokens": 2, **fields})
    assert (error["code"], error["param"]) == ("unsupported_option", next(iter(fields)))


def test_options_that_ask_for_nothing_pass(server: Live) -> None:
    harmless = {
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": None,
        "user": "me",
        "response_format": {"type": "text"},
        "store": False,
        "stop": None,
        "n": None,
    }
    answer = server.chat(max_tokens=2, **harmless)
    past = {**answer["choices"][0]["message"], "tool_calls": None, "refusal": None}
    body = {"messages": [*HELLO, past, *HELLO], "max_tokens": 2}
    assert server.post(CHAT, body).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "a " * 2000},
        {"prompt": [1] * 1024},
        {"prompt": [4096]},
        {"prompt": [2**31 - 1]},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "max_tokens": 3, "min_tokens": 4},
        {"prompt": "a", "stop_token_ids": [5000]},
        {"prompt": "a", "midlogit": {"preset": "bold"}},
        {"prompt": "a", "midlogit": {"alpha_rule": "fixed:2"}},
        {"prompt": "a", "midlogit": {"base_prompt": [9999]}},
        {"prompt": ["a"] * 400},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_what_the_models_cannot_do(server: Live, fields: dict[str, Any]) -> None:
    error = refused(server, 400, COMPLETIONS, fields)
    if fields["prompt"] in ("a " * 2000, [1] * 1024):
        assert error["code"] == "context_length_exceeded"


def test_huge_max_tokens_means_all_that_fits(server: Live) -> None:
    prompt = [5] * 1020
    answer = server.complete(prompt, max_tokens=10**9, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 1020, "completion_tokens": 4, "total_tokens": 1024}


def test_bodies_too_large(server: Live) -> None:
    headers = {"Content-Type": "application/json"}
    huge = b'{"prompt": "' + b"a" * 50_000_000 + b'"}'
    assert (
        refused(server, 413, COMPLETIONS, content=huge, headers=headers)["code"] == "body_too_large"
    )

    def unannounced() -> Any:
        for _ in range(50):
            yield b"a" * 1_000_000

    assert (
        refused(server, 413, COMPLETIONS, content=unannounced(), headers=headers)["code"]
        == "body_too_large"
    )
    # A body beyond all measure is not read to its end.
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += "Content-Length: 99999999999\r\n\r\n"
        plain.sendall(head.encode())
        assert plain.recv(200).startswith(b"HTTP/1.1 413")


def test_other_errors(server: Live) -> None:
    assert (
        refused(server, 404, COMPLETIONS, {"prompt": "a", "model": "gpt-4"})["code"]
        == "model_not_found"
    )
    assert server.http.get("/v1/models/other").status_code == 404
    refused(server, 404, "/v2/completions", {})
    assert server.http.get(COMPLETIONS).status_code == 405
    refused(
        server, 415, COMPLETIONS, content=b'{"prompt":"a"}', headers={"Content-Type": "text/plain"}
    )
    refused(server, 422, "/tokenize", {})
    refused(server, 422, "/detokenize", {"tokens": "x"})
    refused(server, 400, "/detokenize", {"tokens": [10**6]})


def test_a_client_that_goes_away_in_its_body(server: Live) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
        b"GA",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as plain:
            plain.sendall(sent)
    server.complete("a", max_tokens=1)
    server.wait_idle()
