"""Prometheus metrics, under vLLM's names with the prefix `midlogit:`; knows ended sequences, no request."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import nan
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from midlogit.requests.sequence import Sequence
from midlogit.server.gate import Gate

TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
INTER_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
)
LATENCY = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240)
ALPHA = tuple(n / 20 for n in range(1, 21))
NATS = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)


class Metrics:
    """One server's metrics, in a registry of their own.

    Args:
        speculation: returns `DraftLength.statistics` of the pair.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, gate: Gate, speculation: Callable[[], dict[str, Any]]) -> None:
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"midlogit:{name}", text, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"midlogit:{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"midlogit:{name}", text, buckets=buckets, registry=self._registry)

        gauge("num_requests_running", "Completions in the running batch.").set_function(
            lambda: gate.running
        )
        gauge("num_requests_waiting", "Completions waiting to run.").set_function(
            lambda: gate.waiting
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of the teacher.")
        self._generation_tokens = counter("generation_tokens", "Generated tokens.")
        self._scored_tokens = counter("scored_tokens", "Given tokens scored.")
        self._ended = counter("request_success", "Completions ended, by reason.", "finished_reason")
        self._failures = counter("request_failures", "Requests that failed, by kind.", "kind")
        self._connections = gauge("num_connections", "Open connections.")
        self._closed = counter(
            "connections_closed",
            "Connections that the server closed: which wait was too long (head, body, answer, idle), or no room.",
            "reason",
        )
        self._first = histogram(
            "time_to_first_token_seconds", "From submission to the first token.", TTFT
        )
        self._inter = histogram(
            "inter_token_latency_seconds", "Between two tokens of a completion.", INTER_TOKEN
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From submission to the last token.", LATENCY
        )
        self._alpha = histogram(
            "alpha", "Weight of the teacher per token; forced tokens left out.", ALPHA
        )
        drafts = gauge(
            "speculation_acceptance",
            "Share of verified drafts that were accepted; NaN before the first.",
        )
        drafts.set_function(
            lambda: speculation()["acceptance"] if speculation()["verified"] else nan
        )
        gauge("speculation_accepted_tokens", "Accepted drafts.").set_function(
            lambda: speculation()["accepted"]
        )
        gauge("speculation_verified_tokens", "Verified drafts.").set_function(
            lambda: speculation()["verified"]
        )
        self._kl = histogram(
            "kl_nats",
            "Larger of KL(q||base), KL(q||teacher) per token; forced tokens left out.",
            NATS,
        )

    def sequence_ended(self, sequence: Sequence) -> None:
        """Counts a sequence; called from the engine's thread."""
        assert sequence.completion is not None
        reason = sequence.completion.finish_reason
        if reason != "error":  # its request fails with it, and is counted there, once
            self._ended.labels(reason).inc()

        self._prompt_tokens.inc(len(sequence.request.teacher_ids))
        self._generation_tokens.inc(len(sequence.token_ids))

        times = sequence.token_times
        if times:
            self._first.observe(times[0] - sequence.submitted)
            self._latency.observe(times[-1] - sequence.submitted)
        for before, after in pairwise(times):
            self._inter.observe(after - before)

        for decision in sequence.decisions:
            if not decision.forced:
                self._alpha.observe(decision.alpha)
                self._kl.observe(max(decision.kl_base, decision.kl_teacher))

    def scored(self, tokens: int) -> None:
        self._scored_tokens.inc(tokens)

    def failed(self, kind: str) -> None:
        """Counts a failed request by its error's code."""
        self._failures.labels(kind).inc()

    def count_connections(self, number: Callable[[], int]) -> None:
        """Takes what tells the number of open connections."""
        self._connections.set_function(number)

    def connection_closed(self, reason: str) -> None:
        self._closed.labels(reason).inc()

    def exposition(self) -> bytes:
        return generate_latest(self._registry)
