"""An engine that dies: what runs is answered, health fails at once, failures count once, the process ends with 1."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from midlogit import EngineFailure, Pair, SamplingParams
from midlogit.models.checkpoint import bundled
from midlogit.server import serve
from tests.server.conftest import COMMAND, bundled_pair, events, process, run_server

# `midlogit serve`, whose engine dies in the step after a prompt of the word poison has its first token.
MORTAL = f"""
from midlogit.engines.local.engine import LocalEngine

step = LocalEngine.step

def step_and_die(self):
    step(self)
    if any(job.request.prompt == "poison" and job.token_ids for job in self._live.values()):
        raise SystemExit("device lost")

LocalEngine.step = step_and_die
{COMMAND}
"""
LONG = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}


def test_the_process_answers_what_runs_and_ends_with_1() -> None:
    with (
        process("--log-format", "json", code=MORTAL) as (child, http),
        ThreadPoolExecutor(1) as pool,
    ):
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            first = next(lines)
            whole = pool.submit(http.post, "/v1/completions", json=LONG)
            poisoned = http.post(
                "/v1/completions", json={"prompt": "poison", "n": 2, "max_tokens": 9}
            )
            found = list(events(iter([first, *lines])))  # ends in [DONE]
        for response in (poisoned, whole.result(60)):
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_failure"
        _, log = child.communicate(timeout=60)

    assert found[-1]["error"]["code"] == "engine_failure"
    assert found[0]["choices"][0]["text"]
    assert child.returncode == 1
    (said,) = [line for line in log.splitlines() if line.startswith("midlogit: ")]
    assert said.startswith("midlogit: The engine failed: SystemExit: device lost.")
    assert log.count("stopping: The engine failed") == 1


def test_health_fails_at_once_and_failures_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FAREWELL_S", 60)
    with run_server(bundled_pair) as live:
        told = threading.Event()

        def broken() -> None:
            raise RuntimeError(f"lost {bundled('base')}")

        def ended(sequence: object) -> None:
            """Asks for the server's health when the first of the requests is told, in the engine's thread."""
            live.service.metrics.sequence_ended(sequence)  # type: ignore[arg-type]
            if not told.is_set():
                healths.append(httpx.get(f"{live.url}/health").status_code)
                told.set()

        healths: list[int] = []
        live.pair.observer = ended
        live.pair.engine.step = broken  # type: ignore[attr-defined]
        response = live.post("/v1/completions", {"prompt": "a", "n": 3})
        assert response.status_code == 500 and "lost" not in response.text
        assert response.json()["error"]["code"] == "engine_failure"
        assert healths == [503]
        metrics = live.service.metrics.exposition().decode()
        assert 'request_failures_total{kind="engine_failure"} 1.0' in metrics
        with pytest.raises(EngineFailure):
            live.pair.generate(["a"])


def test_an_observer_that_fails_keeps_the_death_from_nobody() -> None:
    with Pair.local(dtype="float32", device="cpu", max_num_seqs=2) as pair:

        def refuse(_: object) -> None:
            raise ValueError("not today")

        pair.observer = refuse  # the first completion breaks the engine; the others end with it, waiting ones too
        params = SamplingParams.preset("balanced", max_tokens=5)
        completions = pair.generate(["a", "b", "c", "d"], params)
        reasons = [completion.finish_reason for completion in completions]
        assert "ValueError: not today" in str(pair.engine.failure)
        assert reasons.count("error") >= 2
        with pytest.raises(EngineFailure):
            pair.generate(["a"])
