"""What is not the answer to its call never becomes tokens; the same tokens come by trying again."""

from __future__ import annotations

import itertools
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest

from midlogit import Completion, Pair, SamplingParams
from midlogit.engines.http import client, rows
from midlogit.engines.http.client import BrokenAnswer, CallFailed, Client, endpoint
from tests.http.calls import model_of, post
from tests.http.conftest import WHOLE, Urls
from tests.http.damage import DAMAGE
from tests.http.proxy import Proxy
from tests.http.test_engine import PROMPTS

PARAMS = SamplingParams(max_tokens=6, seed=11, ignore_eos=True)
FORM = rows.Form(WHOLE, echoes=True)
PROMPT_IDS = [[5, 6, 7], [9, 10]]
TRANSPORT = [
    "truncate", "longer", "shorter", "text", "swap", "twice", "reset", "delay", "429", "500", "502",
]  # fmt: skip
FAULTS = [*DAMAGE, *TRANSPORT]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.01,))


def test_every_damage_is_recognised(urls: Urls) -> None:
    """In rows, drafts and scores alike, except where what is too much was asked for."""
    model = model_of(urls.base)
    top = rows.top_body(model, PROMPT_IDS, 20)
    draft = rows.draft_body(model, PROMPT_IDS[0], 20, rows.DraftRequest(4, 1.0, seed=1))
    scores = rows.score_body(model, PROMPT_IDS, [7, 8, 9])
    for body, read, unseen in (
        (top, rows.read_top, set()),
        (draft, rows.read_drafts, set()),
        (scores, rows.read_scores, {"ids too many"}),
    ):
        whole = post(urls.base, "/v1/completions", body)
        expected = read(deepcopy(whole), body, FORM)
        for name in DAMAGE.keys() - unseen:
            damaged = DAMAGE[name](deepcopy(whole))
            with pytest.raises(
                (BrokenAnswer, KeyError, TypeError, IndexError, ValueError, AttributeError)
            ):
                print(name, read(damaged, body, FORM))
        assert read(whole, body, FORM) == expected


def test_an_answer_is_put_in_the_order_of_its_prompts(urls: Urls) -> None:
    body = rows.top_body(model_of(urls.base), PROMPT_IDS, 20)
    whole = post(urls.base, "/v1/completions", body)
    expected = rows.read_top(whole, body, FORM)
    whole["choices"].reverse()
    assert rows.read_top(whole, body, FORM) == expected


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("speculation", ["off", 4])
def test_same_tokens_through_faults(
    urls: Urls, proxies: tuple[Proxy, Proxy], speculation: str | int
) -> None:
    """Of four calls three meet a fault, until each side has met each fault."""

    def generate(pair: Pair) -> list[Completion]:
        return pair.generate(PROMPTS[:4], PARAMS, progress=False)

    with Pair.http(urls.base, urls.teacher, speculation=speculation) as pair:  # type: ignore[arg-type]
        expected = [c.token_ids for c in generate(pair)]

    base, teacher = proxies
    left = {proxy: [*FAULTS] for proxy in proxies}
    with Pair.http(base.url, teacher.url, speculation=speculation, max_retries=60) as pair:  # type: ignore[arg-type]
        for proxy, mine in left.items():
            proxy.fault = lambda call, mine=mine: mine.pop() if call % 4 and mine else ""  # type: ignore[misc]
        while any(left.values()):
            found = generate(pair)
            assert [c.error for c in found] == [None] * len(found)
            assert [c.token_ids for c in found] == expected


@contextmanager
def counting_server(extra: bytes) -> Iterator[str]:
    """Answers {"n": N} to the Nth request of all, and sends `extra` on the same connection shortly after; its URL."""
    numbers = itertools.count()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(65536):
                content = json.dumps({"n": next(numbers)}).encode()
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                connection.sendall(b"%s%d\r\n\r\n%s" % (head, len(content), content))
                time.sleep(0.02)
                connection.sendall(extra)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "extra",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"n":99}',
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"{}",
    ],
    ids=["an answer", "half an answer", "no answer"],
)
def test_a_connection_with_unread_bytes_is_not_used_again(extra: bytes) -> None:
    caller = Client(pool=4, timeout=5.0, retries=0)
    try:
        with counting_server(extra) as url:
            server = endpoint("base", url, None)
            for expected in range(3):
                assert caller.run(caller.call_once(server, "/models")) == {"n": expected}
                time.sleep(0.1)
    finally:
        caller.close()


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ("2", 2, 2),
        ("0.5", 0.5, 0.5),
        ("0", 0, 0),
        ("86400", 60, 60),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60, 60),
        # What says no time to wait: the client's own first wait.
        ("-5", 0.25, 0.32),
        ("inf", 0.25, 0.32),
        ("-inf", 0.25, 0.32),
        ("nan", 0.25, 0.32),
        ("1e999", 0.25, 0.32),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.25, 0.32),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0.25, 0.32),
        ("soon", 0.25, 0.32),
        ("", 0.25, 0.32),
    ],
)
def test_waits_that_servers_ask_for_are_finite_and_capped(
    given: str, low: float, high: float
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            head = f"HTTP/1.1 429 Busy\r\nRetry-After: {given}\r\nContent-Length: 2\r\n\r\n{{}}"
            connection.sendall(head.encode())

    threading.Thread(target=refuse, daemon=True).start()
    caller = Client(pool=1, timeout=5.0, retries=0)
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with listener, pytest.raises(CallFailed) as caught:
            caller.run(caller.call_once(endpoint("base", url, None), "/models"))
        wait = caller.backoff(0, caught.value)
        assert math.isfinite(wait) and low <= wait <= high
    finally:
        caller.close()
