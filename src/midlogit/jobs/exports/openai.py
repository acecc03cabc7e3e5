"""Answers of the OpenAI batch API: one line per input row, its completions as choices; knows no files.

The lines are those of OpenAI and of vLLM's run-batch. Tokens in log-probabilities are named by their ids, as by vLLM's
return_tokens_as_token_ids. What OpenAI does not have is where midlogit's server has it: `token_ids` and `midlogit`.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from midlogit.jobs.exports.results import Choices, Results, Tally, in_slices

MODEL = "midlogit"
NOTHING = -9999.0  # for −inf, which JSON has not, as vLLM
COLUMNS = (
    "row_id",
    "sample",
    "prompt_form",
    "text",
    "token_ids",
    "finish_reason",
    "stop_reason",
    "weights_changed",
    "error",
    "prompt_tokens",
    "base_prompt_tokens",
    "completion_tokens",
)
MODELS = (
    "base_logprobs",
    "teacher_logprobs",
    "base_tempered_logprobs",
    "teacher_tempered_logprobs",
)
PER_TOKEN = ("logprobs", *MODELS, "top_q_ids", "top_q_logprobs")

Row = dict[str, Any]  # of the results


def answers(results: Results, tally: Tally, choices: Choices) -> Iterator[dict[str, Any]]:
    """One line per input row, errors among them."""
    columns = [*COLUMNS, *(name for name in PER_TOKEN if name in results.schema.names)]
    rows = (row for table in in_slices(results.read(columns)) for row in table.to_pylist())
    for row_id, samples in groupby(rows, lambda row: row["row_id"]):
        yield _line(row_id, list(samples), results, tally)


def _line(row_id: str, samples: list[Row], results: Results, tally: Tally) -> dict[str, Any]:
    digest = hashlib.sha256(f"{results.manifest.fingerprint} {row_id}".encode()).hexdigest()[:24]
    good = [sample for sample in samples if sample["error"] is None]
    failed = [sample for sample in samples if sample["error"] is not None]
    tally.errors += len(failed)
    body = (
        _body(good, digest, results)
        if good
        else {"error": {**ERROR, "message": failed[0]["error"]}}
    )

    return {
        "id": f"batch_req_{digest}",
        "custom_id": row_id,
        "response": {
            "status_code": 200 if good else 400,
            "request_id": f"req_{digest}",
            "body": body,
        },
        "error": _error(failed, len(samples)) if failed else None,
    }


ERROR = {"type": "invalid_request_error", "param": None, "code": "invalid_request"}


def _error(failed: list[Row], count: int) -> dict[str, str]:
    """Why a row has no answer, or fewer choices than it should."""
    told = failed[0]["error"]
    if len(failed) < count:
        told = f"Sample {failed[0]['sample']} of {count} failed: {told}"
    return {"code": ERROR["code"], "message": told}


def _body(samples: list[Row], digest: str, results: Results) -> dict[str, Any]:
    """The body of a chat completion, or of a text completion."""
    is_chat = samples[0]["prompt_form"] == "messages" or (
        samples[0]["prompt_form"] == "text" and results.manifest.reading.chat
    )
    created = datetime.datetime.fromisoformat(results.manifest.created)
    prompt_tokens = samples[0]["prompt_tokens"]
    completion_tokens = sum(sample["completion_tokens"] for sample in samples)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(created.timestamp()),
        "model": MODEL,
        "choices": [_choice(sample, is_chat) for sample in samples],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _choice(sample: Row, is_chat: bool) -> dict[str, Any]:
    text = sample["text"]
    given: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text, "refusal": None}}
        if is_chat
        else {"text": text}
    )
    diagnostics = {
        name: [_finite(value) for value in sample[name]] for name in MODELS if name in sample
    }
    changed = sample["weights_changed"]
    return {
        "index": sample["sample"],
        **given,
        "logprobs": _logprobs(sample, is_chat) if "logprobs" in sample else None,
        "finish_reason": sample["finish_reason"],
        "stop_reason": sample["stop_reason"],
        "token_ids": sample["token_ids"],
        **({"weights_changed": changed.split(", ")} if changed else {}),
        "midlogit": {
            "base_prompt_tokens": sample["base_prompt_tokens"],
            **({"diagnostics": diagnostics} if diagnostics else {}),
        },
    }


def _logprobs(sample: Row, is_chat: bool) -> dict[str, Any]:
    """log q of every token, and of its candidates where the job stored them."""
    tokens = list(zip(sample["token_ids"], sample["logprobs"], strict=True))
    tops = _tops(sample)
    if not is_chat:
        return {
            "tokens": [_name(i) for i, _ in tokens],
            "token_logprobs": [_finite(logprob) for _, logprob in tokens],
            "top_logprobs": [
                {_name(i): _finite(logprob) for i, logprob in ((token, own), *top)}
                for (token, own), top in zip(tokens, tops, strict=True)
            ],
        }
    return {
        "content": [
            {**_entry(*token), "top_logprobs": [_entry(*candidate) for candidate in top]}
            for token, top in zip(tokens, tops, strict=True)
        ],
        "refusal": None,
    }


def _tops(sample: Row) -> list[list[tuple[int, float]]]:
    """The candidates of q at each position."""
    if "top_q_ids" not in sample:
        return [[] for _ in sample["token_ids"]]
    return [
        list(zip(ids, logprobs, strict=True))
        for ids, logprobs in zip(sample["top_q_ids"], sample["top_q_logprobs"], strict=True)
    ]


def _entry(token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": _name(token_id), "logprob": _finite(logprob), "bytes": None}


def _name(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else NOTHING
