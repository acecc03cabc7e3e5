"""Log-probabilities of a prompt's own tokens in vLLM's form; knows scores, no request."""

from __future__ import annotations

from collections.abc import Sequence

from midlogit.outputs import Candidates, Scores
from midlogit.server.alone import Side
from midlogit.server.pieces import finite, tops_of
from midlogit.server.vocabulary import Vocabulary
from midlogit.server.wire.responses import PromptLogprob

Position = dict[str, PromptLogprob]  # by token id


def prompt_logprobs(
    prompt_ids: Sequence[int], scores: Scores, vocabulary: Vocabulary, side: Side | None
) -> list[Position | None]:
    """One entry for each token of a prompt: the token and the most likely others; None where nothing was scored.

    Args:
        prompt_ids: those of the side whose positions are asked for; its last ones were scored.
        side: the model whose log-probabilities these are, over its whole vocabulary; None for log q.
    """
    facts = scores.diagnostics
    logprobs, logmass = facts.logprobs, [0.0] * len(facts.logprobs)
    if side == "base":
        logprobs, logmass = facts.base_tempered_logprobs, facts.base_support_logmass
    if side == "teacher":
        logprobs, logmass = facts.teacher_tempered_logprobs, facts.teacher_support_logmass

    given = scores.token_ids[scores.first :]
    found: list[Position | None] = [None] * (len(prompt_ids) - len(given))
    tops = tops_of(scores.top, len(given))
    for token_id, logprob, mass, top in zip(given, logprobs, logmass, tops, strict=True):
        others = [(i, value + mass) for i, value in (top.q if top else [])]
        found.append(_position(token_id, logprob, others, vocabulary))
    return found


def _position(
    token_id: int, logprob: float, candidates: Candidates, vocabulary: Vocabulary
) -> Position:
    """The token itself, then the candidates; its rank is one more than theirs where it is not among them.

    The token comes first, as in vLLM, because clients take the first entry for its score.
    """
    known = {**dict(candidates), token_id: logprob}
    ranks = {i: rank for rank, i in enumerate(known, start=1)}
    return {
        str(i): {
            "logprob": finite(known[i]),
            "rank": ranks[i],
            "decoded_token": vocabulary.text(i),
        }
        for i in dict.fromkeys((token_id, *known))
    }
