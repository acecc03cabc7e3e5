"""The server as a process: start, keys, logs, metrics, health, cross-origin calls, stop."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from midlogit import MidlogitError, Pair
from midlogit.models.checkpoint import bundled
from midlogit.server.gate import Gate
from midlogit.server.logs import LineHandler
from midlogit.server.serve import AddressUnavailable, listen, serve
from midlogit.server.settings import ServerSettings
from tests.server.conftest import Live, bundled_pair, events, free_port, process, run_server


@pytest.fixture(autouse=True)
def own_loggers() -> Iterator[None]:
    """Takes away the handlers that `serve` gives to the loggers of this process."""
    yield
    for name in ("midlogit.server", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def test_a_life_of_the_process() -> None:
    """Keys, a second server on the port, JSON logs, SIGTERM in the middle of a stream."""
    folder = str(bundled("base").parent)
    names = ("--base", f"{folder}/base", "--teacher", f"{folder}/teacher", "--log-format", "json")
    with process(*names, "--host", "127.0.0.1", MIDLOGIT_API_KEY="key-one key-two") as (
        child,
        http,
    ):
        port = str(http.base_url.port)
        second = subprocess.run(
            [
                sys.executable,
                "-c",
                "from midlogit.cli.main import run; run()",
                "serve",
                "--port",
                port,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (second.returncode, second.stderr.count("\n")) == (1, 1)
        assert second.stderr.startswith(f"midlogit: Cannot listen on 127.0.0.1:{port}")
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 60,
            "ignore_eos": True,
            "stream": True,
        }
        assert http.post("/v1/chat/completions", json=body).status_code == 401
        headers = {"Authorization": "Bearer key-two", "X-Request-Id": "my-own-id"}
        with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            assert response.headers["x-request-id"] == "my-own-id"
            lines = response.iter_lines()
            first = next(lines)
            child.send_signal(signal.SIGTERM)
            found = list(events(iter([first, *lines])))
        assert found[0]["id"] == "chatcmpl-my-own-id"
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        _, log = child.communicate(timeout=30)
        assert child.returncode in (0, -signal.SIGTERM)
    entries = [json.loads(line) for line in log.splitlines()]
    messages = [entry["message"] for entry in entries]
    assert messages[-1].startswith("stopped: 1 finished, 0 ended early")
    assert any(
        entry.get("request_id") == "my-own-id" and entry["status"] == 200 for entry in entries
    )
    assert folder not in log and "key-one" not in log and "key-two" not in log


def test_while_loading_and_when_the_pair_cannot_be_opened() -> None:
    port, may_fail, problems = free_port(), threading.Event(), []

    def open_pair() -> Pair:
        may_fail.wait(30)
        raise MidlogitError("no such pair")

    def run() -> None:
        try:
            serve(ServerSettings(port=port), open_pair)
        except MidlogitError as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                health = http.get("/health")
                break
            time.sleep(0.05)
        assert health.status_code == 503 and health.json()["error"]["code"] == "loading"
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/tokenize", {"prompt": "a"}),
        ):
            response = http.post(path, json=body)
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert http.get("/").status_code == http.get("/version").status_code == 200
        may_fail.set()
    thread.join()
    assert [str(problem) for problem in problems] == ["no such pair"]


def test_addresses() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(AddressUnavailable):
        listen("127.0.0.1", taken.getsockname()[1])
    for host, port in (("203.0.113.1", 8000), ("no host", 8000)):
        with pytest.raises(AddressUnavailable):
            listen(host, port)


def test_a_warning_when_open_to_others(capsys: pytest.CaptureFixture[str]) -> None:
    def open_pair() -> Pair:
        raise MidlogitError("not today")

    for settings, warned in (
        (ServerSettings(host="0.0.0.0", port=0), True),
        (ServerSettings(host="0.0.0.0", port=0, api_keys=("secret-key",)), False),
        (ServerSettings(port=0), False),
    ):
        with pytest.raises(MidlogitError):
            serve(settings, open_pair)
        log = capsys.readouterr().err
        assert ("anyone who can reach" in log) == warned and "secret-key" not in log


def test_a_log_that_cannot_be_written_costs_no_request() -> None:
    with run_server(bundled_pair) as live:
        for output in (None, io.StringIO()):
            logging.getLogger("midlogit.server").handlers = [LineHandler(output)]
            if output is not None:
                output.close()
            assert live.complete(max_tokens=1)["choices"]


def test_bad_settings_and_options() -> None:
    for settings in (
        {"preset": "bold"},
        {"api_keys": ("",)},
        {"max_queued": -1},
        {"max_body_bytes": 0},
        {"max_connections": 0},
        {"port": 70000},
    ):
        with pytest.raises(MidlogitError):
            ServerSettings(**settings)  # type: ignore[arg-type]
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


def test_keys() -> None:
    with run_server(bundled_pair, api_keys=("key-one", "clé-two")) as live:
        body = {"prompt": "a", "max_tokens": 1}
        for value in (
            "",
            "Bearer",
            "Bearer wrong",
            "key-one",
            "Basic key-one",
            "Bearer key-one2",
            "Bearer key-on",
        ):
            response = live.post(
                "/v1/completions", body, headers={"Authorization": value} if value else {}
            )
            assert response.status_code == 401
            assert (
                response.json()["error"]["code"] == "invalid_api_key"
                and "key-one" not in response.text
            )
        for path in (
            "/v1/models",
            "/tokenizer_info",
            "/no/such/path",
            "//v1/models",
            "/v1/completions/",
        ):
            assert live.http.get(path).status_code == 401
        for path in ("/", "/health", "/version", "/metrics", "/openapi.json"):
            assert live.http.get(path).status_code == 200
        good = {"Authorization": "Bearer key-one"}
        assert live.post("/v1/completions", body, headers=good).status_code == 200


def test_request_ids(server: Live) -> None:
    given = server.http.get("/version", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for odd in ("a" * 200, "with space", "naïve"):
        made = server.http.get("/version", headers={"X-Request-Id": odd.encode()}).headers[
            "x-request-id"
        ]
        assert re.fullmatch("[0-9a-f]{32}", made)
    assert (
        server.http.get("/nowhere", headers={"X-Request-Id": "e-1"}).headers["x-request-id"]
        == "e-1"
    )


def test_metrics() -> None:
    with run_server(lambda: bundled_pair(2), max_num_seqs=2) as live:

        def read() -> dict[str, float]:
            text = live.http.get("/metrics").text
            return {
                k: float(v)
                for k, v in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
            }

        with live.http.stream(
            "POST",
            "/v1/completions",
            json={"prompt": "a", "n": 5, "max_tokens": 400, "ignore_eos": True, "stream": True},
        ) as response:
            lines = response.iter_lines()  # held, for httpx closes what is not
            next(lines)
            busy = read()
            assert (
                busy["midlogit:num_requests_running"],
                busy["midlogit:num_requests_waiting"],
            ) == (2, 3)
        live.wait_idle()
        before = read()
        assert (
            before["midlogit:num_requests_running"] == before["midlogit:num_requests_waiting"] == 0
        )
        live.complete("Once upon a time", max_tokens=9, ignore_eos=True)
        live.complete("Once upon a time", max_tokens=0, echo=True, logprobs=0)
        live.post("/v1/completions", {"prompt": "a", "temperature": -1})
        after = read()
        grown = {name: value - before.get(name, 0) for name, value in after.items()}
        prompt_tokens = len(live.pair.mixing.teacher.encode("Once upon a time"))
        assert grown["midlogit:generation_tokens_total"] == 9
        assert grown["midlogit:prompt_tokens_total"] == prompt_tokens
        assert grown["midlogit:scored_tokens_total"] == prompt_tokens - 1
        assert grown["midlogit:time_to_first_token_seconds_count"] == 1
        assert grown["midlogit:inter_token_latency_seconds_count"] == 8
        assert grown["midlogit:alpha_count"] == grown["midlogit:kl_nats_count"] == 8
        assert grown['midlogit:request_success_total{finished_reason="length"}'] == 1
        assert grown['midlogit:request_failures_total{kind="invalid_type"}'] == 1
        drafts = live.pair.statistics()["speculation"]
        assert after["midlogit:speculation_verified_tokens"] == drafts["verified"] > 0
        assert after["midlogit:speculation_accepted_tokens"] == drafts["accepted"]
        assert after["midlogit:speculation_acceptance"] == drafts["acceptance"]


def test_cross_origin_calls_are_off_unless_asked_for(server: Live) -> None:
    preflight = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    assert (
        "access-control-allow-origin"
        not in server.http.options("/v1/completions", headers=preflight).headers
    )
    with run_server(
        bundled_pair, allow_origins=("https://chat.example",), api_keys=("k1",)
    ) as live:
        answer = live.http.options("/v1/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        other = live.http.options(
            "/v1/completions", headers={**preflight, "Origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in other.headers


def test_stopping_ends_what_takes_too_long() -> None:
    """After the grace period streams end in good order, and say so."""
    with run_server(bundled_pair, grace_s=0.3) as live:
        body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with live.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            live.service.stop()
            assert httpx.post(f"{live.url}/v1/completions", json={"prompt": "a"}).status_code == 503
            threading.Timer(0.3, live.service.close).start()
            found = list(events(iter([first, *lines])))
        assert found[-1]["choices"][0]["finish_reason"] == "abort"


def test_the_gate_counts() -> None:
    gate = Gate(2, 3, 100)
    first = gate.enter(4)
    assert (gate.running, gate.waiting) == (2, 2)
    first.leave()
    first.close()
    first.close()
    assert (gate.running, gate.waiting) == (0, 0)


def test_no_path_in_errors(server: Live, tmp_path: Path) -> None:
    text = (
        server.http.get("/v1/models").text
        + server.http.get("/openapi.json").text
        + server.http.get("/metrics").text
    )
    assert str(bundled("base").parent) not in text
