"""Bodies and answers of /v1/completions for rows of log-probabilities; knows vLLM's JSON, sends nothing.

Measured against vLLM 0.24 and 0.32: log-probabilities are the raw ones whatever the sampling parameters,
"token_id:N" keys need return_tokens_as_token_ids, logprob_token_ids replaces the top-k list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from midlogit.engines.http.client import CallFailed

MAX_SCORED = 128  # ids in one logprob_token_ids
KEY = "token_id:"
NOTHING = -9999.0  # how vLLM writes −∞
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


def top_body(model: str, prompts: Sequence[Sequence[int]], k: int) -> dict[str, Any]:
    """Requests the `k` most likely next ids of each prompt."""
    return {"model": model, "prompt": prompts, "logprobs": k, **EXPLICIT}


def score_body(model: str, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> dict[str, Any]:
    """Requests the log-probabilities of chosen next ids of each prompt."""
    return {"model": model, "prompt": prompts, "logprobs": 1, "logprob_token_ids": ids, **EXPLICIT}


def draft_body(model: str, prompt: Sequence[int], k: int, request: DraftRequest) -> dict[str, Any]:
    """Requests drafts, and the `k` most likely ids at each of their positions.

    One prompt per call: all prompts of a call share its seed, so their tokens would not be independent.
    """
    sampling = {
        "max_tokens": request.num_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
    }
    return {"model": model, "prompt": [prompt], "logprobs": k, **EXPLICIT, **sampling}


def read_rows(answer: Any, count: int) -> list[dict[int, float]]:
    """Log-probabilities by id, for each prompt in order.

    Raises:
        CallFailed: an answer of another form; not retryable, the server would send it again.
    """
    try:
        rows = [
            _read_row(choice["logprobs"]["top_logprobs"][0])
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise CallFailed(
            f"its answer holds no log-probabilities by token id ({error!r})", retryable=False
        ) from None

    if len(rows) != count:
        raise CallFailed(f"it answered {len(rows)} of {count} prompts", retryable=False)
    return rows


def read_top(answer: Any, count: int, k: int) -> list[dict[int, float]]:
    """`read_rows` of exactly the `k` most likely ids.

    Raises:
        CallFailed: fewer came than were requested. Retryable, since the fault is transient: vLLM answers so while
            another client has it score chosen ids (it fills the lists of all others with id 0 at −∞).
    """
    return [_exactly(row, k) for row in read_rows(answer, count)]


def read_drafts(answer: Any, request: DraftRequest, k: int) -> list[DraftStep]:
    """The drafts, each with the list it was sampled from.

    A draft that is not among the `k` most likely is missing from its list.

    Raises:
        CallFailed: as `read_top`; or a token that its own list does not name.
    """
    try:
        logprobs = answer["choices"][0]["logprobs"]
        rows = [_read_row(values) for values in logprobs["top_logprobs"]]
        tokens = [int(token[len(KEY) :]) for token in logprobs["tokens"]]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise CallFailed(
            f"its answer holds no drafts by token id ({error!r})", retryable=False
        ) from None

    if not len(rows) == len(tokens) == request.num_tokens:
        raise CallFailed(
            f"it drafted {len(tokens)} of {request.num_tokens} tokens", retryable=False
        )

    steps = [DraftStep(_exactly(row, k), token) for row, token in zip(rows, tokens, strict=True)]
    for row, token in zip(rows, tokens, strict=True):
        if token not in row:
            raise CallFailed(
                f"it drew token {token}, which its own list of {k} does not name", retryable=False
            )
    return steps


def read_scores(answer: Any, count: int, ids: Sequence[int]) -> list[dict[int, float]]:
    """`read_rows` that hold every one of `ids`.

    Raises:
        CallFailed: some are missing.
    """
    rows = read_rows(answer, count)
    for row in rows:
        if not all(i in row for i in ids):
            raise CallFailed("it did not score the ids that were asked for", retryable=False)
    return rows


def most_likely(row: dict[int, float], k: int) -> dict[int, float]:
    """The `k` most likely ids of a row; of equals, the lower id."""
    return (
        row
        if len(row) == k
        else dict(sorted(row.items(), key=lambda item: (-item[1], item[0]))[:k])
    )


def _exactly(row: dict[int, float], k: int) -> dict[int, float]:
    """Exactly `k` ids of a row: vLLM adds the sampled token where it is not among them."""
    given = len(row) - (row.get(0) == -math.inf)
    if given < k:
        raise CallFailed(
            f"it returned {given} log-probabilities where {k} were asked for", healthy=True
        )
    return most_likely(row, k)


def _read_row(values: dict[str, float]) -> dict[int, float]:
    start = len(KEY)
    row = {int(key[start:]): value for key, value in values.items() if key.startswith(KEY)}
    if len(row) != len(values):
        raise ValueError("keys are texts, which are not unique")

    if min(row.values()) <= NOTHING:
        row = {i: value if value > NOTHING else -math.inf for i, value in row.items()}
    return row
