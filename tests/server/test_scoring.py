"""Scores of given text: against a reference in float64, with each form of context, in batches of any make-up."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from midlogit import SamplingParams
from tests.server.conftest import Live

TEXTS = [
    "The fox ran to the river.",
    "Once upon a time there was a little dog who liked to run.",
    "Hi!",
]


def log_q(
    base_V: np.ndarray, teacher_V: np.ndarray, live: Live, token_id: int, top_p: float | None
) -> float:
    """log q of a token by the definition: mask, merge the stops, cut the nucleus, find α, normalise."""
    outcomes = live.pair.mixing.outcomes(SamplingParams())
    rows = []
    for row_V in (base_V, teacher_V):
        p_V = scipy.special.softmax(row_V)
        p_V[outcomes.stop_ids[0]] = p_V[list(outcomes.stop_ids)].sum()
        p_V[[*outcomes.stop_ids[1:], *outcomes.masked_ids]] = 0
        rows.append(p_V / p_V.sum())
    if top_p is not None:
        order_V = np.argsort(-rows[1], kind="stable")
        kept_K = order_V[np.cumsum(rows[1][order_V]) - rows[1][order_V] < top_p]
        rows = [np.where(np.isin(np.arange(len(p_V)), kept_K), p_V, 0) for p_V in rows]
        rows = [p_V / p_V.sum() for p_V in rows]
    with np.errstate(divide="ignore"):
        p_V, t_V = np.log(rows[0]), np.log(rows[1])
    both_V = np.isfinite(p_V) & np.isfinite(t_V)
    ratio_V = t_V[both_V] - p_V[both_V]

    def q(alpha: float) -> np.ndarray:
        return scipy.special.softmax(p_V[both_V] + alpha * ratio_V)

    def excess(alpha: float) -> float:  # KL(q‖p) − KL(q‖t)
        return float(q(alpha) @ ratio_V)

    alpha = scipy.optimize.brentq(excess, 0, 1, xtol=1e-14) if excess(0) < 0 < excess(1) else 0.5
    mixed_V = np.zeros_like(p_V)
    mixed_V[both_V] = q(alpha)
    found = mixed_V[outcomes.outcome_of(token_id)]
    return float(np.log(found)) if found > 0 else -9999.0


def reference(
    models: tuple[torch.nn.Module, torch.nn.Module],
    live: Live,
    base_ids: list[int],
    teacher_ids: list[int],
    given: int,
    top_p: float | None,
) -> list[float]:
    """log q of the last `given` ids, directly from the logits of plain transformers."""
    with torch.inference_mode():
        base_TV, teacher_TV = (
            model(torch.tensor([ids])).logits[0].double().numpy()
            for model, ids in zip(models, (base_ids, teacher_ids), strict=True)
        )
    return [
        log_q(
            base_TV[len(base_ids) - k - 1],
            teacher_TV[len(teacher_ids) - k - 1],
            live,
            teacher_ids[-k],
            top_p,
        )
        for k in range(given, 0, -1)
    ]


@pytest.mark.parametrize(("preset", "top_p"), [("exploratory", None), ("balanced", 0.95)])
def test_scores_are_log_q(
    server: Live, models: tuple[torch.nn.Module, torch.nn.Module], preset: str, top_p: float | None
) -> None:
    answer = server.complete(
        TEXTS, echo=True, max_tokens=0, logprobs=1, midlogit={"preset": preset}
    )
    for text, choice in zip(TEXTS, answer["choices"], strict=True):
        ids = server.pair.mixing.teacher.encode(text)
        first, *scores = choice["logprobs"]["token_logprobs"]
        assert first is None and choice["logprobs"]["top_logprobs"][0] is None
        assert scores == pytest.approx(
            reference(models, server, ids, ids, len(ids) - 1, top_p), abs=1e-4
        )
        assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == text
        assert [
            text[o : o + len(t)]
            for o, t in zip(
                choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True
            )
        ] == choice["logprobs"]["tokens"]
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_each_side_after_its_own_context(
    server: Live, models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    mixing = server.pair.mixing
    ending = " the fox ran home."
    prompt, base_prompt = "In the evening" + ending, "Long ago, in the big forest," + ending
    body = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0}
    options = {"preset": "exploratory", "base_prompt": base_prompt, "diagnostics": True}
    choice = server.post("/v1/completions", {**body, "midlogit": options}).json()["choices"][0]
    base_ids, teacher_ids = mixing.base.encode(base_prompt), mixing.teacher.encode(prompt)
    given = len(mixing.teacher.encode(ending))
    scored = [lp for lp in choice["logprobs"]["token_logprobs"] if lp is not None]
    assert len(scored) >= given
    assert choice["midlogit"]["first_scored"] == len(teacher_ids) - len(scored)
    assert scored == pytest.approx(
        reference(models, server, base_ids, teacher_ids, len(scored), None), abs=1e-4
    )


def test_scores_agree_with_generation(server: Live) -> None:
    """A sampled token scores the log q that it was sampled with, whatever else is scored beside it."""
    body = {
        "max_tokens": 30,
        "seed": 2,
        "return_token_ids": True,
        "logprobs": 0,
        "midlogit": {"force_first_token": False},
    }
    made = server.complete(TEXTS[0], **body)["choices"][0]
    ids = made["prompt_token_ids"] + made["token_ids"]
    prompts = [ids, [5] * 700, [7, 8], ids]
    scores = server.complete(prompts, echo=True, max_tokens=0, logprobs=0)["choices"]
    for k in (0, 3):
        found = scores[k]["logprobs"]["token_logprobs"][len(made["prompt_token_ids"]) :]
        assert found == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-4)
    assert len(scores[1]["logprobs"]["tokens"]) == 700


def test_one_token_and_longer_texts(server: Live) -> None:
    one = server.complete([9], echo=True, max_tokens=0, logprobs=2)["choices"][0]["logprobs"]
    assert one["token_logprobs"] == [None] and one["top_logprobs"] == [None]
    both = server.complete(TEXTS[0], echo=True, max_tokens=1, logprobs=1, temperature=0)["choices"][
        0
    ]
    count = len(server.pair.mixing.teacher.encode(TEXTS[0]))
    assert len(both["logprobs"]["tokens"]) == count + 1
    assert both["text"].startswith(TEXTS[0])
    long = server.complete([11] * 1023, echo=True, max_tokens=1, logprobs=1)["choices"][0]
    assert len(long["logprobs"]["tokens"]) == 1024


def test_greedy_flags(server: Live) -> None:
    """A token is the most likely one exactly if no candidate of its entry beats it."""
    made = server.complete(
        TEXTS[1],
        max_tokens=12,
        temperature=0,
        return_token_ids=True,
        midlogit={"preset": "exploratory"},
    )
    choice = made["choices"][0]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    body = {
        "echo": True,
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
        "midlogit": {"preset": "exploratory"},
    }
    logprobs = server.complete(ids, **body)["choices"][0]["logprobs"]
    start = len(choice["prompt_token_ids"])
    greedy = [
        lp == max(top.values())
        for lp, top in zip(
            logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True
        )
    ]
    assert all(greedy[start - 1 :]) and not all(greedy[: start - 1])


def test_the_library_scores_too(server: Live) -> None:
    params = SamplingParams.preset("exploratory", top_logprobs=2)
    scores = server.pair.score(TEXTS, params)
    answer = server.complete(
        TEXTS, echo=True, max_tokens=0, logprobs=2, midlogit={"preset": "exploratory"}
    )
    for found, choice in zip(scores, answer["choices"], strict=True):
        assert found.diagnostics.logprobs == pytest.approx(
            choice["logprobs"]["token_logprobs"][1:], abs=1e-5
        )
        assert (
            found.first == 1
            and found.top is not None
            and len(found.top) == len(found.token_ids) - 1
        )
