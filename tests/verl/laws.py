"""q* of a KL budget by bisection over whole rows of plain transformers models; nothing of midlogit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from transformers import AutoModelForCausalLM

from tests.conftest import BASE, TEACHER

STOPS = (1, 0)  # the teacher's ending id, the base's: one outcome, kept at the first


@lru_cache
def model(side: str) -> Any:
    folder = BASE if side == "base" else TEACHER
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(side: str | Any, prompt: list[int], response: list[int]) -> np.ndarray:
    """The rows after the prompt and after each token of the response but the last."""
    network = model(side) if isinstance(side, str) else side
    with torch.inference_mode():
        rows = network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return rows.double().numpy()


def log_q(base: np.ndarray, teacher: np.ndarray, temperature: float, nats: float) -> np.ndarray:
    """log q* of each row, with the largest α whose KL(q‖base) is at most `nats`."""
    p, t = (_outcomes(rows / temperature) for rows in (base, teacher))
    low, high = np.zeros(len(p)), np.ones(len(p))
    for _ in range(60):
        middle = (low + high) / 2
        q = log_softmax((1 - middle)[:, None] * p + middle[:, None] * t, axis=1)
        below = (np.exp(q) * np.where(q > -np.inf, q - p, 0)).sum(1) <= nats
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return log_softmax((1 - low)[:, None] * p + low[:, None] * t, axis=1)


def _outcomes(rows: np.ndarray) -> np.ndarray:
    found = log_softmax(rows, axis=1)
    found[:, STOPS[0]] = logsumexp(found[:, STOPS], axis=1)
    found[:, STOPS[1]] = -1e9
    return found
