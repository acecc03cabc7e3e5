"""Bodies and answers of /inference/v1/generate for rows along one sequence; knows vLLM's JSON, sends nothing.

One request gives the rows at all drafts: of its prompt, with the prefix cache kept. The route needs vLLM 0.32 or later
with `--enable-scale-out`, and chosen ids of a prompt need its second model runner.

An answer is read as those of `rows`: what cannot be the answer to its body is a BrokenAnswer.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from uuid import uuid4

import numpy as np

from midlogit.engines.http import rows
from midlogit.engines.http.client import BrokenAnswer

PATH = "//inference/v1/generate"
PADDING = -1  # in place of an id, where a position has fewer chosen ids than others


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """The rows after a prefix and after each draft that follows it.

    Attributes:
        drafted: the drafts. ids: chosen ids for each row, one list more than there are drafts.
    """

    drafted: Sequence[int]
    ids: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that a server must have room for after the prefix: the drafts, the closing and a sampled one."""
        return len(self.drafted) + 2


def verify_body(
    model: str, prefix: Sequence[int], k: int, request: VerifyRequest
) -> dict[str, Any]:
    """Requests the `k` most likely ids and the chosen ids of each row, in one prompt.

    vLLM gives no row for the last token of a prompt, so one more closes it: its first, which hardly ever comes next.
    A token that does come next would be in the prefix cache by then, and with it the row after it, which the next call
    needs.
    """
    width = max(map(len, request.ids))
    return {
        "model": model,
        "request_id": uuid4().hex,
        "token_ids": [*prefix, *request.drafted, prefix[0]],
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 0.0,
            "ignore_eos": True,
            "detokenize": False,
            "prompt_logprobs": k,
            "prompt_logprob_token_ids": [
                [*ids, *[PADDING] * (width - len(ids))] for ids in request.ids
            ],
            "prompt_logprob_start": len(prefix) - 1,
            "skip_reading_prefix_cache": False,
        },
    }


def read_verified(
    answer: Any, body: dict[str, Any], form: rows.Form
) -> list[dict[int, float]] | None:
    """The rows: the most likely ids, and the chosen ones.

    None where the prefix cache holds some of the drafts, as after another sequence with the same tokens: vLLM computes
    no rows there.

    Raises:
        BrokenAnswer: this is not the answer to `body`.
    """
    if form.echoes and answer["request_id"] != f"generate-tokens-{body['request_id']}":
        raise BrokenAnswer("it answered another request")

    prompt, asked = body["token_ids"], body["sampling_params"]
    read = answer["usage"]["prompt_tokens"]
    if read != len(prompt):
        raise BrokenAnswer(f"it read {read} of {len(prompt)} prompt tokens")

    chosen = asked["prompt_logprob_token_ids"]
    lists = answer["prompt_logprobs"][1:]  # nothing precedes the first token
    if len(lists) < len(chosen) or answer.get("prompt_token_id_logprobs") is None:
        return None

    k = asked["prompt_logprobs"]
    listed = [_read_list(values, form) for values in lists[-len(chosen) :]]
    for row, token_id in zip(listed, prompt[-len(chosen) :], strict=True):
        if token_id not in row:
            raise BrokenAnswer(f"its list of {k} does not name token {token_id}, which follows")
    scores = _read_scores(answer["prompt_token_id_logprobs"], chosen)
    return [score | rows.exactly(row, k) for score, row in zip(scores, listed, strict=True)]


def _read_list(values: dict[str, dict[str, float]], form: rows.Form) -> dict[int, float]:
    return rows.possible({int(key): value["logprob"] for key, value in values.items()}, form)


def _read_scores(encoded: str, chosen: list[list[int]]) -> list[dict[int, float]]:
    """Log-probabilities of the chosen ids of each row."""
    scores = np.load(BytesIO(b64decode(encoded)))
    if scores.shape != np.shape(chosen):
        raise BrokenAnswer("it did not score the ids that were asked for")
    if not (scores <= rows.ROUNDING).all():  # nor NaN
        raise BrokenAnswer("it returned values that are no log-probabilities")
    return [
        {i: score for i, score in zip(ids, values, strict=True) if i != PADDING}
        for ids, values in zip(chosen, scores.tolist(), strict=True)
    ]
