"""Answers to chat prompts, and the logits of other models at their tokens; knows no engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.local import PROMPTS
from midlogit.decide.base import RowSettings
from midlogit.decide.rows import Sampled

PRESETS = ("balanced", "exploratory")
TOKENS = 24


class Answer(NamedTuple):
    """A text of a pair.

    Attributes:
        prompts: the ids that each side has read.
        settings: of its tokens but the first, which is forced.
    """

    prompts: dict[str, tuple[int, ...]]
    tokens: list[int]
    settings: list[RowSettings]


def answers_to(pair: Any, preset: str) -> list[Answer]:
    """The pair's answers to all prompts."""
    from midlogit import SamplingParams
    from midlogit.requests.prompts import Reading
    from midlogit.requests.sequence import Positions

    asked = SamplingParams.preset(preset, max_tokens=TOKENS, seed=1, ignore_eos=True)
    requests = pair.prepare(PROMPTS, asked, Reading(chat=True))
    completions = pair.generate(PROMPTS, asked, chat=True, progress=False)

    answers = []
    for request, completion in zip(requests, completions, strict=True):
        tokens, positions = completion.token_ids, Positions(request)
        settings = [positions.settings_at(n) for n in range(1, len(tokens))]
        prompts = {"base": request.base_ids, "teacher": request.teacher_ids}
        answers.append(Answer(prompts, tokens, settings))
    return answers


@torch.inference_mode()
def rows_of(model: nn.Module, side: str, answer: Answer) -> Tensor:
    """Logits [N, V] of a model in the place of a side, at each of the tokens but the first."""
    prompt = answer.prompts[side]
    ids = torch.tensor([[*prompt, *answer.tokens[:-1]]])
    return model(ids).logits[0, len(prompt) :].float()


def q_of(sampled: Sampled, width: int) -> Tensor:
    """q* [N, width] of sampled rows, float64; 0 off the support."""
    q_NK: Tensor = sampled.log_q_NV.double().exp()
    if sampled.support is None:
        return q_NK
    everywhere_NV = torch.zeros((len(q_NK), width), dtype=q_NK.dtype)
    return everywhere_NV.scatter(-1, sampled.support.columns_NK, q_NK)
