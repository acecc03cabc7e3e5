"""What a request may cost: counts refused before any work, work in turns with others, none once its client has left."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from midlogit import InvalidRequest, SamplingParams
from midlogit.engines.local.engine import LocalEngine
from midlogit.models.checkpoint import Checkpoint
from midlogit.server import call
from midlogit.server.body import MOST_VALUES
from midlogit.server.service import BODIES
from tests.server.conftest import Live, bundled_pair, run_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ROWS = 8  # of the trainer's server
MANY = 12_000  # completions of a request that it takes


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose queue has no limit, so that its other limits are what holds."""
    folder = tmp_path_factory.mktemp("weights")
    settings: dict[str, Any] = {"train": True, "max_queued": None, "weights_root": folder}
    with run_server(
        lambda: bundled_pair(ROWS), max_num_seqs=ROWS, max_body_bytes=2**17, **settings
    ) as live:
        yield live
        live.wait_idle()


class Encoding:
    """Every text that is tokenized while it is watched, and in which thread; each takes a millisecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.threads: set[str] = set()
        encode: Callable[..., list[int]] = Checkpoint.encode

        def slow(checkpoint: Checkpoint, text: str, **options: Any) -> list[int]:
            self.texts.append(text)
            self.threads.add(threading.current_thread().name)
            time.sleep(0.001)
            return encode(checkpoint, text, **options)

        monkeypatch.setattr(Checkpoint, "encode", slow)

    def has_ended(self) -> bool:
        """Whether nothing more is tokenized."""
        number = len(self.texts)
        time.sleep(0.5)
        return len(self.texts) == number


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Encoding:
    return Encoding(monkeypatch)


def waiting(live: Live, path: str, body: dict[str, Any]) -> socket.socket:
    """A client that has sent a request and leaves when its connection is closed."""
    host, port = live.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    opened = socket.create_connection((host, int(port)), timeout=20)
    opened.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return opened


@pytest.mark.parametrize(
    ("path", "fields", "status", "code"),
    [
        (COMPLETIONS, {"prompt": ["a"] * 2000, "n": 128}, 400, "too_many_completions"),
        (COMPLETIONS, {"prompt": [[5]] * 10_000}, 400, "too_many_completions"),
        (
            COMPLETIONS,
            {"prompt": ["a"] * 200, "n": 128, "echo": True, "logprobs": 1, "max_tokens": 0},
            400,
            "too_many_completions",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "midlogit": {"teacher_prompt": ["b"] * 1000}},
            400,
            "invalid_request",
        ),
        (COMPLETIONS, {"prompt": "a", "stop": ["x" * 999] * 5}, 422, "invalid_type"),
        (COMPLETIONS, {"prompt": "a", "stop": [1] * 500_000}, 422, "invalid_type"),
        (
            COMPLETIONS,
            {"prompt": "a", "midlogit": {f"a{n}": 1 for n in range(50_000)}},
            422,
            "invalid_type",
        ),
        (COMPLETIONS, {"prompt": [1] * (MOST_VALUES + 2)}, 413, "body_too_large"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": [{}] * 200_000}, 413, "body_too_large"),
        (CHAT, {"messages": HELLO * 10_001}, 422, "invalid_type"),
        ("/tokenize", {"messages": HELLO * 10_001}, 422, "invalid_type"),
        ("/detokenize", {"tokens": [5] * 200_000}, 400, "invalid_request"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_too_much_is_refused_untouched(
    server: Live,
    encoding: Encoding,
    path: str,
    fields: dict[str, Any],
    status: int,
    code: str,
) -> None:
    response = server.post(path, fields)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert not encoding.texts and server.service.gate.running == 0


def test_json_as_deep_as_it_gets(server: Live) -> None:
    deep = '{"a":' * 1000 + "1" + "}" * 1000
    for name in ("logit_bias", "chat_template_kwargs", "metadata", "seed"):
        content = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, "{name}": {deep}}}'
        headers = {"Content-Type": "application/json"}
        response = server.http.post(CHAT, content=content.encode(), headers=headers)
        assert response.status_code in (200, 400, 422), response.text


def test_texts_of_more_tokens_than_are_told(server: Live) -> None:
    response = server.post("/tokenize", {"prompt": "\N{FOX FACE}" * 140_000})
    assert response.status_code == 400
    assert "140000 characters and more than 131072 tokens" in response.text
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert server.post("/tokenize", {"prompt": "Once " * 5000}).json()["count"] > 5000


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a", "b"], "n": 128, "logprobs": 20, "max_tokens": 2000},
        {"prompt": [[7] * 900] * 200, "echo": True, "max_tokens": 0, "prompt_logprobs": 256},
        {"prompt": [[7] * 1000] * 2, "n": 128, "echo": True, "logprobs": 20},
    ],
    ids=lambda fields: str(fields)[-60:],
)
def test_answers_that_could_be_too_large(server: Live, fields: dict[str, Any]) -> None:
    fields = fields | {"ignore_eos": True}
    error = server.post(COMPLETIONS, fields | {"logprobs": fields.get("logprobs")}).json()["error"]
    assert error["code"] in ("answer_too_large", "invalid_type"), error
    server.wait_idle()


def test_a_prompt_that_all_share_is_read_once(server: Live, encoding: Encoding) -> None:
    body = {"prompt": ["a", "b"] * 50, "max_tokens": 1}
    body["midlogit"] = {"base_prompt": "Once", "teacher_prompt": HELLO}
    assert server.post(COMPLETIONS, body).status_code == 200
    assert len(encoding.texts) == 2


def test_requests_are_read_in_turns(trainer: Live, encoding: Encoding) -> None:
    """One of thousands of prompts neither keeps a small one waiting, nor is it read on once its client has left."""
    large = waiting(trainer, COMPLETIONS, {"prompt": ["large"] * MANY, "max_tokens": 1})
    wait_for(lambda: len(encoding.texts) > 10)
    assert trainer.complete("small", max_tokens=1)["usage"]["completion_tokens"] == 1
    assert {"large", "small"} <= set(encoding.texts) and "large" in encoding.texts[-100:]
    large.close()
    wait_for(encoding.has_ended)
    assert len(encoding.texts) < 2 * MANY
    trainer.wait_idle()
    assert encoding.threads <= {"midlogit-prompts_0", "midlogit-long-prompts_0"}


def test_a_trainers_batch_takes_seats_as_they_come_free(trainer: Live) -> None:
    """The engine holds no more of it than it is about to need, and a trainer's abort ends all of it."""
    body = {"prompt": [[n, 5, 6] for n in range(512)], "n": 8, "max_tokens": 900}
    body |= {"ignore_eos": True, "logprobs": 0, "return_token_ids": True}
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(trainer.post(COMPLETIONS, body)))
    thread.start()
    wait_for(lambda: trainer.rows > 0)
    assert trainer.rows <= 2 * ROWS
    assert trainer.service.gate.running + trainer.service.gate.waiting == 4096
    assert trainer.post("/abort_requests").json()["aborted"] == 4096

    thread.join()
    choices = answers[0].json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(4096))
    assert choices[-1]["prompt_token_ids"] == [511, 5, 6]
    assert {choice["finish_reason"] for choice in choices} == {"abort"}
    answer = trainer.complete("a", max_tokens=1, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    trainer.wait_idle()


def test_more_than_a_trainer_may_ask_for(trainer: Live) -> None:
    response = trainer.post(COMPLETIONS, {"prompt": [[5]] * 512, "n": 33, "max_tokens": 1})
    assert response.json()["error"]["code"] == "too_many_completions"


def test_answers_are_made_beside_the_event_loop(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    from midlogit.server.completions import CompletionCall

    threads = set()
    choice = CompletionCall.choice

    def watched(*arguments: Any) -> dict[str, Any]:
        threads.add(threading.current_thread().name.rpartition("_")[0])
        return choice(*arguments)

    monkeypatch.setattr(CompletionCall, "choice", watched)
    answer = server.complete(["a", "b"], n=3, max_tokens=20, logprobs=20, ignore_eos=True)
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert threads == {"midlogit-answers"}


def test_bodies_are_bounded_together(trainer: Live) -> None:
    """Bodies that are still being sent count, and what they held is free once their clients have left."""
    limit = trainer.service.settings.max_body_bytes
    host, port = trainer.url.removeprefix("http://").split(":")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {limit}\r\n\r\n"
    slow = []
    try:
        for _ in range(BODIES):
            slow.append(socket.create_connection((host, int(port)), timeout=20))
            slow[-1].sendall(head.encode() + b" " * (limit - 1))
        wait_for(lambda: trainer.service.bodies._held > (BODIES - 1) * limit)
        response = trainer.post("/tokenize", {"prompt": "a" * (limit // 2)})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert response.headers["retry-after"]
    finally:
        for connection in slow:
            connection.close()
    wait_for(lambda: trainer.service.bodies._held == 0)
    assert trainer.post("/tokenize", {"prompt": "a" * (limit // 2)}).status_code == 200


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_prompts_are_scored_bit_by_bit(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {
        "prompt": ["Once upon a time", "The fox ran", "a b"],
        "n": 2,
        "max_tokens": 0,
        "echo": True,
    }
    asked: list[dict[str, Any]] = [{"logprobs": 3}, {"prompt_logprobs": 2}]
    whole = [server.complete(**body, **fields)["choices"] for fields in asked]
    streamed = server.stream(COMPLETIONS, body | {"logprobs": 3})

    calls = []
    run = server.pair.run_scores
    monkeypatch.setattr(call, "SCORED", 1)
    monkeypatch.setattr(
        server.pair, "run_scores", lambda requests: calls.append(len(requests)) or run(requests)
    )
    parts = [server.complete(**body, **fields)["choices"] for fields in asked]
    again = server.stream(COMPLETIONS, body | {"logprobs": 3})
    assert [shapes(choices) for choices in parts] == [shapes(choices) for choices in whole]
    assert [shapes(e["choices"]) for e in again] == [shapes(e["choices"]) for e in streamed]
    assert calls == [1] * 9


def shapes(choices: list[dict[str, Any]]) -> list[Any]:
    """Choices without the numbers, which depend in their last digits on what is computed together."""
    return [
        (
            choice["index"],
            choice["text"],
            (choice["logprobs"] or {}).get("tokens"),
            [position and sorted(position) for position in choice.get("prompt_logprobs", [])],
        )
        for choice in choices
    ]


def test_a_call_of_the_library_that_nobody_can_keep(server: Live) -> None:
    server.wait_idle()  # rows of requests that other tests gave up
    params = SamplingParams(n=16_384)
    for run in (server.pair.generate, server.pair.as_completed):
        with pytest.raises(InvalidRequest, match="16384000 completions"):
            run(["a"] * 1000, params)
    assert isinstance(server.pair.engine, LocalEngine) and not server.rows
