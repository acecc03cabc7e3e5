"""Bodies and answers of /v1/completions for rows of log-probabilities; knows vLLM's JSON, sends nothing.

An answer is read against the body that it answers. What cannot be the answer to that body is a BrokenAnswer; so is what
makes a reader raise KeyError, TypeError, ValueError, IndexError or AttributeError (`Client.call_once`).

Measured against vLLM 0.24 and 0.32: log-probabilities are the raw ones whatever the sampling parameters,
"token_id:N" keys need return_tokens_as_token_ids, logprob_token_ids replaces the top-k list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import uuid4

from midlogit.engines.http.client import BrokenAnswer

MAX_SCORED = 128  # ids in one logprob_token_ids
KEY = "token_id:"
NOTHING = -9999.0  # how vLLM writes −∞
ROUNDING = 1e-3  # by which log-probabilities and sums of probabilities may be too large
COLDEST, HOTTEST = (
    0.01,
    2.0,
)  # vLLM takes lower temperatures above 0 for the first, and refuses higher ones

# A server takes omitted parameters from the model's generation_config.json, so none is omitted.
# Greedy, because then the sampled token is in the list and a repeated call returns the same one.
EXPLICIT = {
    "max_tokens": 1,
    "min_tokens": 0,
    "n": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": True,
    "echo": False,
    "stream": False,
    "return_tokens_as_token_ids": True,
}


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Successive tokens for a server to sample: how many, at which temperature, from which seed."""

    num_tokens: int
    temperature: float
    seed: int

    @classmethod
    def near(cls, temperature: float, num_tokens: int, seed: int) -> DraftRequest:
        """A request at the nearest temperature that servers sample at."""
        return cls(
            num_tokens, min(max(temperature, COLDEST), HOTTEST) if temperature else 0.0, seed
        )

    @property
    def num_drafts(self) -> int:
        """The draft length γ: all tokens but the last, which is the base's draft for the bonus position."""
        return self.num_tokens - 1

    def probs(self, row: dict[int, float]) -> dict[int, float]:
        """Probability of each id of a list under the request's temperature, given that one of them is sampled."""
        peak = max(row.values())
        weights = {i: math.exp((logprob - peak) / self.temperature) for i, logprob in row.items()}
        total = math.fsum(weights.values())
        return {i: weight / total for i, weight in weights.items()}


class DraftStep(NamedTuple):
    """One drafted position: the most likely ids with their log-probabilities, and the token sampled there."""

    row: dict[int, float]
    token_id: int


class Form(NamedTuple):
    """What the answers of one server have in common.

    Attributes:
        logit_size: ids are below it. echoes: whether an answer carries the id of its request.
    """

    logit_size: int
    echoes: bool


def top_body(model: str, prompts: Sequence[Sequence[int]], k: int) -> dict[str, Any]:
    """Requests the `k` most likely next ids of each prompt."""
    return _body(model, prompts, k)


def score_body(model: str, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> dict[str, Any]:
    """Requests the log-probabilities of chosen next ids of each prompt."""
    return _body(model, prompts, 1) | {"logprob_token_ids": ids}


def draft_body(model: str, prompt: Sequence[int], k: int, request: DraftRequest) -> dict[str, Any]:
    """Requests drafts, and the `k` most likely ids at each of their positions.

    One prompt per call: all prompts of a call share its seed, so their tokens would not be independent.
    """
    return _body(model, [prompt], k) | {
        "max_tokens": request.num_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
    }


def echoes(answer: Any, body: dict[str, Any]) -> bool:
    """Whether an answer carries the id of its request, from which vLLM makes its own."""
    return bool(answer["id"] == f"cmpl-{body['request_id']}")


def read_rows(answer: Any, body: dict[str, Any], form: Form) -> list[dict[int, float]]:
    """Log-probabilities by id, for each prompt in order.

    Raises:
        BrokenAnswer: this is not the answer to `body`.
    """
    return [_read_rows(choice, 1, form)[0] for choice in _choices(answer, body, form)]


def read_top(answer: Any, body: dict[str, Any], form: Form) -> list[dict[int, float]]:
    """`read_rows` of exactly the most likely ids, as many as `body` asks for.

    Raises:
        BrokenAnswer: as `read_rows`, or other numbers of ids came. Fewer are transient: vLLM answers so while
            another client has it score chosen ids (it fills the lists of all others with id 0 at −∞).
    """
    return [exactly(row, body["logprobs"]) for row in read_rows(answer, body, form)]


def read_drafts(answer: Any, body: dict[str, Any], form: Form) -> list[DraftStep]:
    """The drafts, each with the list it was sampled from.

    A draft that is not among the `k` most likely is missing from its list.

    Raises:
        BrokenAnswer: as `read_top`; or a token that its own list does not name.
    """
    (choice,) = _choices(answer, body, form)
    rows = _read_rows(choice, body["max_tokens"], form)
    tokens = [int(token.removeprefix(KEY)) for token in choice["logprobs"]["tokens"]]
    k = body["logprobs"]

    steps = []
    for row, token in zip(rows, tokens, strict=True):
        if token not in row:
            raise BrokenAnswer(f"it drew token {token}, which its own list of {k} does not name")
        steps.append(DraftStep(exactly(row, k), token))
    return steps


def read_scores(answer: Any, body: dict[str, Any], form: Form) -> list[dict[int, float]]:
    """`read_rows` that hold every id that `body` asks for.

    Raises:
        BrokenAnswer: as `read_rows`, or some are missing.
    """
    rows = read_rows(answer, body, form)
    if not all(i in row for row in rows for i in body["logprob_token_ids"]):
        raise BrokenAnswer("it did not score the ids that were asked for")
    return rows


def most_likely(row: dict[int, float], k: int) -> dict[int, float]:
    """The `k` most likely ids of a row; of equals, the lower id."""
    return (
        row
        if len(row) == k
        else dict(sorted(row.items(), key=lambda item: (-item[1], item[0]))[:k])
    )


def exactly(row: dict[int, float], k: int) -> dict[int, float]:
    """The `k` most likely ids of a row that holds no more than one other: vLLM adds the token that follows.

    Raises:
        BrokenAnswer: it holds fewer, or more.
    """
    given = len(row) - (row.get(0) == -math.inf)
    if not k <= given <= k + 1:
        raise BrokenAnswer(
            f"it returned {given} log-probabilities where {k} were asked for", healthy=given < k
        )
    return most_likely(row, k)


def possible(row: dict[int, float], form: Form) -> dict[int, float]:
    """A row as it came, with −∞ for what vLLM writes instead.

    Raises:
        BrokenAnswer: its ids or values cannot be.
    """
    if not 0 <= min(row) <= max(row) < form.logit_size:
        raise BrokenAnswer(f"it returned ids beyond its {form.logit_size}")

    lowest, highest = min(row.values()), max(row.values())
    mean = -math.log(form.logit_size)  # each row names the most likely id, whatever else it names
    is_possible = lowest >= NOTHING and mean - ROUNDING <= highest <= ROUNDING
    if not is_possible or sum(map(math.exp, row.values())) > 1 + ROUNDING:
        raise BrokenAnswer("it returned values that are no log-probabilities")
    if lowest == NOTHING:
        row = {i: value if value > NOTHING else -math.inf for i, value in row.items()}
    return row


def _body(model: str, prompts: Sequence[Sequence[int]], k: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompts,
        "logprobs": k,
        "request_id": uuid4().hex,
        **EXPLICIT,
    }


def _choices(answer: Any, body: dict[str, Any], form: Form) -> list[Any]:
    """The choices in the order of the prompts, one for each."""
    if form.echoes and not echoes(answer, body):
        raise BrokenAnswer("it answered another request")

    prompts = body["prompt"]
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != len(prompts):
        raise BrokenAnswer(f"it answered {len(choices)} of {len(prompts)} prompts")
    if [choice["index"] for choice in choices] != list(range(len(prompts))):
        raise BrokenAnswer("it answered a prompt twice")

    read, sent = answer["usage"]["prompt_tokens"], sum(map(len, prompts))
    if read != sent:
        raise BrokenAnswer(f"it read {read} of {sent} prompt tokens")
    return choices


def _read_rows(choice: Any, count: int, form: Form) -> list[dict[int, float]]:
    """The rows of one choice, a token each."""
    lists = choice["logprobs"]["top_logprobs"]
    if len(lists) != count:
        raise BrokenAnswer(f"it drew {len(lists)} of {count} tokens")
    return [_read_row(values, form) for values in lists]


def _read_row(values: dict[str, float], form: Form) -> dict[int, float]:
    start = len(KEY)
    row = {int(key[start:]): value for key, value in values.items() if key.startswith(KEY)}
    if not row or len(row) != len(values):  # texts are not unique
        raise BrokenAnswer("it returned no log-probabilities by token id")
    return possible(row, form)
