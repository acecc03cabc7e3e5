"""Drafts verified as one sequence, by a teacher on vLLM's second model runner (`make test-verification`).

MIDLOGIT_TEST_VERIFIER names one that runs already.
"""

from __future__ import annotations

import base64
import io
import os
import random
import re
import urllib.request
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from midlogit import Completion, Pair, SamplingParams
from midlogit.engines.http import client, rows, verification
from midlogit.engines.http.client import BrokenAnswer
from midlogit.models.checkpoint import bundled
from tests.http.calls import model_of, post
from tests.http.conftest import FLAGS, WHOLE, Urls
from tests.http.proxy import Proxy
from tests.http.servers import Server
from tests.http.test_engine import BASE_PROMPTS, PROMPTS

FORM = rows.Form(WHOLE, echoes=True)
PREFIX = [20 + 7 * n % 900 for n in range(150)]  # four blocks of 32 and 22 tokens more
DRAFTED = [31, 41, 59, 26]
CHOSEN = [[7, 8, n] for n in range(9, 14)]
SAMPLED = SamplingParams(max_tokens=16, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def verifier() -> Iterator[str]:
    """The URL of a teacher that verifies drafts as one sequence."""
    given = os.environ.get("MIDLOGIT_TEST_VERIFIER")
    if given:
        yield given
        return
    server = Server(bundled("teacher"), *FLAGS, "--enable-scale-out", second_runner=True)
    try:
        server.wait()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def between(urls: Urls, verifier: str) -> Iterator[tuple[Proxy, Proxy]]:
    """A proxy before the base and before the verifying teacher."""
    with Proxy(urls.base) as base, Proxy(verifier) as teacher:
        yield base, teacher


def computed(url: str) -> float:
    """Prompt tokens that a server has computed, not read from its prefix cache."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r'prompt_tokens_by_source_total\{.*source="local_compute".*\} (\S+)', text)
    return sum(map(float, found))


def asked_of(url: str, first: int) -> tuple[dict[str, Any], Any]:
    """A request for the rows after a prefix of its own and the drafts, and the server's answer."""
    request = verification.VerifyRequest(DRAFTED, CHOSEN)
    body = verification.verify_body(model_of(url), [first, *PREFIX], 20, request)
    return body, post(url, "/inference/v1/generate", body)


def generate(pair: Pair, params: SamplingParams, prompts: int = 3) -> list[Completion]:
    found = pair.generate(
        base_prompts=BASE_PROMPTS[:prompts],
        teacher_prompts=PROMPTS[:prompts],
        params=params,
        progress=False,
    )
    assert [c.error for c in found] == [None] * prompts
    return found


def test_the_rows_are_those_of_prompts_of_their_own(verifier: str) -> None:
    """And the server computes the open block once, not once for each row."""
    prefixes = [[3, *PREFIX, *DRAFTED[:n]] for n in range(5)]
    post(verifier, "/v1/completions", rows.top_body(model_of(verifier), prefixes[:1], 20))
    before = computed(verifier)
    body, answer = asked_of(verifier, 3)
    found = verification.read_verified(answer, body, FORM)
    once = computed(verifier) - before
    assert found is not None

    top = rows.top_body(model_of(verifier), prefixes, WHOLE)
    expected = rows.read_top(post(verifier, "/v1/completions", top), top, FORM)
    for row, whole, chosen in zip(found, expected, CHOSEN, strict=True):
        assert row.keys() == rows.most_likely(whole, 20).keys() | set(chosen)
        assert row == pytest.approx({i: whole[i] for i in row}, abs=1e-4)
    apart = computed(verifier) - before - once
    assert (once, apart) == (28, 23 + 24 + 25 + 26 + 27)


def test_rows_that_the_prefix_cache_hides_are_missing(verifier: str) -> None:
    """The sequence again, so long that a block ends within its drafts."""
    request = verification.VerifyRequest(DRAFTED, CHOSEN)
    prefix = [random.randrange(1000, 4000), *PREFIX, *PREFIX[:8]]
    body = verification.verify_body(model_of(verifier), prefix, 20, request)
    answers = [post(verifier, "/inference/v1/generate", body) for _ in range(2)]
    assert verification.read_verified(answers[0], body, FORM) is not None
    assert verification.read_verified(answers[1], body, FORM) is None


def with_scores(answer: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    scores = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])))
    file = io.BytesIO()
    np.save(file, change(scores))
    return {**answer, "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}


def last_list(answer: Any) -> dict[str, Any]:
    return answer["prompt_logprobs"][-1]  # type: ignore[no-any-return]


def changed(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def damaged(answer: Any) -> Any:
        change(answer)
        return answer

    return damaged


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "another request's id": lambda answer: {**answer, "request_id": "generate-tokens-0"},
    "other prompts": lambda answer: {**answer, "usage": {"prompt_tokens": 1}},
    "rows of other positions": changed(lambda answer: answer["prompt_logprobs"].pop()),
    "id short": changed(lambda answer: last_list(answer).popitem()),
    "id beyond the vocabulary": changed(
        lambda answer: last_list(answer).update({"4096": last_list(answer).popitem()[1]})
    ),
    "value above 0": changed(
        lambda answer: next(iter(last_list(answer).values())).update(logprob=0.5)
    ),
    "null list": changed(lambda answer: answer["prompt_logprobs"].__setitem__(-1, None)),
    "no lists": lambda answer: {**answer, "prompt_logprobs": None},
    "scores short": lambda answer: with_scores(answer, lambda scores: scores[1:]),
    "a score above 0": lambda answer: with_scores(answer, lambda scores: scores + 99),
    "a score that is no number": lambda answer: with_scores(answer, lambda scores: scores * np.nan),
    "scores cut": lambda answer: {
        **answer,
        "prompt_token_id_logprobs": answer["prompt_token_id_logprobs"][:80],
    },
    "null": lambda answer: None,
}


def test_every_damage_is_recognised(verifier: str) -> None:
    body, whole = asked_of(verifier, 5)
    for name, damage in DAMAGE.items():
        with pytest.raises(
            (BrokenAnswer, KeyError, TypeError, IndexError, ValueError, AttributeError)
        ):
            print(name, verification.read_verified(damage(deepcopy(whole)), body, FORM))
    assert verification.read_verified(whole, body, FORM) is not None


@pytest.mark.parametrize(("preset", "temperature"), [("balanced", 1.0), ("exploratory", 0.0)])
def test_a_round_asks_the_teacher_once_for_one_sequence(
    between: tuple[Proxy, Proxy], preset: str, temperature: float
) -> None:
    """And gives the tokens that prompts of their own give."""
    base, teacher = between
    params = SamplingParams.preset(
        preset, max_tokens=20, seed=3, ignore_eos=True, temperature=temperature
    )
    tokens, requests = {}, {}
    for scales_out in (True, False):
        teacher.scales_out = scales_out
        with Pair.http(base.url, teacher.url, speculation=4) as pair:
            calls, sequences, verified = teacher.calls, teacher.rows, teacher.verifications
            base_calls = base.calls
            tokens[scales_out] = generate(pair, params, 1)[0].token_ids
            rounds = pair.statistics()["speculation"]["rounds"]
            calls, sequences = teacher.calls - calls, teacher.rows - sequences
            verified = teacher.verifications - verified
        requests[scales_out] = sequences / rounds
        lockstep = 2 * 2  # the first token and perhaps the last: a row, and perhaps its scores
        if scales_out:
            assert verified == rounds and calls - verified <= lockstep
            assert sequences <= rounds + lockstep
        else:
            assert verified == 0 and calls > rounds
        print(
            f"{preset}, temperature {temperature}: {rounds} rounds, {base.calls - base_calls} calls"
            f" to the base, {calls} to the teacher with {sequences} prompts"
        )
    assert tokens[True] == tokens[False]
    assert requests[True] < requests[False] / 2.5


def test_tokens_do_not_depend_on_the_way_drafts_are_verified(
    between: tuple[Proxy, Proxy],
) -> None:
    """In a batch, and once more where the prefix cache hides some rows; a bound may jump where rows are rounded."""
    base, teacher = between
    found = []
    for scales_out in (False, True, True):
        teacher.scales_out = scales_out
        with Pair.http(base.url, teacher.url, speculation=4) as pair:
            found.append(generate(pair, SAMPLED))
    expected, *others = found
    for completions in others:
        for ours, theirs in zip(completions, expected, strict=True):
            assert ours.token_ids == theirs.token_ids
            for name, tolerance in (
                ("alpha", 1e-3),
                ("logprobs", 1e-3),
                ("teacher_logprobs", 1e-3),
                ("tv_bound", 0.02),
            ):
                assert getattr(ours.diagnostics, name) == pytest.approx(
                    getattr(theirs.diagnostics, name), abs=tolerance
                ), name


def test_a_lost_answer_is_asked_for_again(
    between: tuple[Proxy, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.02,))
    base, teacher = between
    params = replace(SAMPLED, seed=12)
    with Pair.http(base.url, teacher.url, speculation=4, max_retries=20) as pair:
        expected = generate(pair, params, 1)[0].token_ids
        teacher.fault = lambda call: "reset" if random.Random(call).random() < 0.4 else ""
        assert generate(pair, params, 1)[0].token_ids == expected


@pytest.mark.parametrize("field", ["prompt_logprob_token_ids", "prompt_logprobs"])
def test_a_server_that_ignores_a_field_verifies_by_prompts_of_their_own(
    between: tuple[Proxy, Proxy], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.02, 0.05, 0.1))
    base, teacher = between

    def without(path: str, body: Any) -> Any:
        asked = body.get("sampling_params", {})
        if asked.pop(field, None) is not None:
            asked.pop("prompt_logprob_start", None)
        return body

    teacher.rewrite_request = without
    with Pair.http(base.url, teacher.url, speculation=4) as pair:
        before = teacher.verifications
        generate(pair, SAMPLED, 1)
        assert pair.statistics()["speculation"]["rounds"] > 0
        assert teacher.verifications == before


def test_a_context_filled_to_the_end(between: tuple[Proxy, Proxy]) -> None:
    """The last drafts leave no room for the token that closes a sequence: they are prompts of their own."""
    base, teacher = between
    with Pair.http(base.url, teacher.url, speculation=4) as pair:
        room = pair.mixing.base.max_context - 490
        completion = pair.generate([[7] * 490], replace(SAMPLED, max_tokens=400))[0]
        assert (len(completion.token_ids), completion.finish_reason) == (room, "length")
        assert teacher.verifications > 0
