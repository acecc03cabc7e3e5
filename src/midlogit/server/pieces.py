"""Parts of the answers of both endpoints: log-probabilities, usage, data of the mixture; knows no body and no route.

`logprobs` are log q of the distribution sampled from. JSON has no −inf, which is written as NOTHING.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from midlogit.outputs import Candidates, Completion, Diagnostics, Scores, Token, Top
from midlogit.requests.sequence import Request
from midlogit.server.vocabulary import Offsets, Vocabulary, by_id
from midlogit.server.wire.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    MixtureFacts,
    TokenLogprob,
    TopLogprob,
    Usage,
)

NOTHING = -9999.0  # as vLLM


def finite(logprob: float) -> float:
    return max(logprob, NOTHING)


def candidates_of(token_id: int, logprob: float, top: Top | None) -> Candidates:
    """The token itself, then the most likely others."""
    return [
        (token_id, logprob),
        *((i, value) for i, value in (top.q if top else []) if i != token_id),
    ]


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Top | None],
    offsets: Offsets,
    vocabulary: Vocabulary,
    as_ids: bool,
) -> CompletionLogprobs:
    """Log-probabilities in the legacy form; None for a token that was not scored.

    Every candidate has its own entry: where two have the same text, the second is named by its id.
    """
    top_logprobs: list[dict[str, float] | None] = []
    for token_id, logprob, top in zip(token_ids, logprobs, tops, strict=True):
        if logprob is None:
            top_logprobs.append(None)
            continue

        named: dict[str, float] = {}
        for i, value in candidates_of(token_id, logprob, top):
            name = vocabulary.text(i, as_ids)
            named[by_id(i) if name in named else name] = finite(value)
        top_logprobs.append(named)

    return {
        "tokens": [vocabulary.text(i, as_ids) for i in token_ids],
        "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
        "top_logprobs": top_logprobs,
        "text_offset": [offsets.next(i) for i in token_ids],
    }


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return {
        "tokens": first["tokens"] + second["tokens"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
        "text_offset": first["text_offset"] + second["text_offset"],
    }


def chat_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    tops: Sequence[Top | None],
    vocabulary: Vocabulary,
    as_ids: bool,
) -> ChatLogprobs:
    def entry(token_id: int, logprob: float) -> TopLogprob:
        return {
            "token": vocabulary.text(token_id, as_ids),
            "logprob": finite(logprob),
            "bytes": vocabulary.bytes(token_id),
        }

    content: list[TokenLogprob] = []
    for token_id, logprob, top in zip(token_ids, logprobs, tops, strict=True):
        shown = [entry(*candidate) for candidate in top.q] if top else []
        content.append({**entry(token_id, logprob), "top_logprobs": shown})
    return {"content": content}


def tops_of(top: list[Top] | None, count: int) -> Sequence[Top | None]:
    return top if top is not None else [None] * count


def facts_of_completion(completion: Completion, vocabulary: Vocabulary) -> MixtureFacts:
    """The lists of `midlogit generate --json`, and the text of every token in `top`."""
    facts: MixtureFacts = {
        "diagnostics": asdict(completion.diagnostics),
        "base_prompt_tokens": completion.usage.base_prompt_tokens,
    }
    return facts | _tops(completion.top, vocabulary)


def facts_of_token(token: Token, vocabulary: Vocabulary) -> MixtureFacts:
    """`facts_of_completion` for one token of a stream."""
    facts: MixtureFacts = {"diagnostics": asdict(Diagnostics.of([token.decision]))}
    return facts | _tops(None if token.decision.top is None else [token.decision.top], vocabulary)


def facts_of_scores(scores: Scores) -> MixtureFacts:
    return {"first_scored": scores.first, "prompt_diagnostics": asdict(scores.diagnostics)}


def _tops(tops: list[Top] | None, vocabulary: Vocabulary) -> MixtureFacts:
    if tops is None:
        return {}
    ids = {i for top in tops for some in (top.q, top.base, top.teacher) for i, _ in some}
    return {
        "top": [{"q": top.q, "base": top.base, "teacher": top.teacher} for top in tops],
        "tokens": {str(i): vocabulary.text(i) for i in sorted(ids)},
    }


def usage_of(requests: Sequence[Request], completion_tokens: int) -> Usage:
    """Token counts of a call; each prompt counts once, however many completions it has."""
    prompt_tokens = sum(len(request.teacher_ids) for request in requests if request.sample == 0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
