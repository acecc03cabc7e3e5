"""Whether texts of a real pair are drawn from q*, and how far scores move; knows no times and no results file.

Law: base and teacher are equally far from q* at each token whose α is free; log q - log base, averaged over the tokens
that were drawn, is KL(q‖base), and the same for the teacher. Means are given with their standard errors.

Shift: texts are drawn from q of one pair and scored by another, q'. With r = q'(y)/q(y) of a drawn token y, the mean of
r - 1 - log r is KL(q‖q'), and the mean of max(0, 1 - r) their total variation, both averaged over positions.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.real_prompts import chats

if TYPE_CHECKING:
    from benchmarks.real_speed import Size
    from midlogit import Completion, Scores

PRESETS = ("balanced", "exploratory")
MAX_TOKENS = 256


def sample(pair: Any, size: Size, preset: str, gamma: int | str) -> list[Completion]:
    """Completions of the chat prompts that end by themselves, at one seed."""
    from midlogit import SamplingParams
    from midlogit.engines.vllm.options import draft_length

    pair.engine.lockstep.draft_length = draft_length(gamma)
    tokens = MAX_TOKENS if size.num_texts > 2 else size.tokens
    asked = SamplingParams.preset(preset, max_tokens=tokens, seed=1)
    found = pair.generate(chats(0, size.num_texts), asked, chat=True, progress=False)
    if any(completion.error for completion in found):
        raise RuntimeError(found[0].error)
    return found


def law(pair: Any, size: Size) -> list[dict[str, Any]]:
    """A row for each preset and γ: α, both KLs, and the same estimated from what was drawn."""
    rows = []
    for preset in PRESETS:
        lockstep: list[list[int]] = []
        for gamma in size.gammas[:-1]:
            found = sample(pair, size, preset, gamma)
            ids = [completion.token_ids for completion in found]
            lockstep = lockstep or ids
            rows.append(
                {
                    "preset": preset,
                    "gamma": gamma,
                    "acceptance": pair.engine.lockstep.draft_length.statistics()["acceptance"],
                    **describe(found),
                    "ended": sum(completion.finish_reason == "stop" for completion in found),
                    "same_texts": sum(a == b for a, b in zip(ids, lockstep, strict=True)),
                    "same_prefix": sum(map(common_prefix, ids, lockstep)) / sum(map(len, lockstep)),
                    "sha256": hashlib.sha256(repr(ids).encode()).hexdigest()[:16],
                }
            )
    return rows


def common_prefix(ours: list[int], theirs: list[int]) -> int:
    """How many tokens two texts have in common before they part."""
    return next(
        (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )


def describe(found: list[Completion]) -> dict[str, Any]:
    """Means over the tokens whose α is free."""
    names = (
        "alpha",
        "kl_base",
        "kl_teacher",
        "logprobs",
        "base_support_logprobs",
        "teacher_support_logprobs",
        "forced",
    )
    columns = {
        name: np.concatenate([getattr(completion.diagnostics, name) for completion in found])
        for name in names
    }
    free = (columns["forced"] == 0) & (columns["alpha"] < 1) & (columns["alpha"] > 0)
    c = {name: column[free] for name, column in columns.items()}
    differences = np.abs(c["kl_base"] - c["kl_teacher"])
    return {
        "tokens": len(free),
        "free": int(free.sum()),
        "mean_alpha": float(c["alpha"].mean()),
        "kl_base": float(c["kl_base"].mean()),
        "kl_teacher": float(c["kl_teacher"].mean()),
        "largest_difference": float(differences.max()),
        "drawn_kl_base": mean_and_error(c["logprobs"] - c["base_support_logprobs"]),
        "drawn_kl_teacher": mean_and_error(c["logprobs"] - c["teacher_support_logprobs"]),
        "drawn_minus_exact": {
            side: mean_and_error(c["logprobs"] - c[f"{side}_support_logprobs"] - c[f"kl_{side}"])
            for side in ("base", "teacher")
        },
    }


def mean_and_error(values: np.ndarray) -> list[float]:
    """[mean, its standard error]."""
    return [float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))]


def sampled_texts(found: list[Completion]) -> list[tuple[list[int], int]]:
    """Each text as the teacher read it, with the number of its tokens that were drawn."""
    return [(one.prompt_token_ids + one.token_ids, len(one.token_ids)) for one in found]


def scores_of(pair: Any, texts: list[tuple[list[int], int]]) -> list[Scores]:
    """Scores of sampled texts, over the whole vocabulary."""
    from midlogit import SamplingParams

    found = pair.score([ids for ids, _ in texts], SamplingParams.preset("exploratory"))
    if any(one.error for one in found):
        raise RuntimeError(found[0].error)
    return found


def shift(
    texts: list[tuple[list[int], int]], before: list[Scores], after: list[Scores]
) -> dict[str, Any]:
    """How far q has moved between two scorings of texts that were drawn from the first."""

    def drawn(scores: list[Scores], name: str) -> np.ndarray:
        return np.concatenate(
            [
                getattr(one.diagnostics, name)[-tokens:]
                for one, (_, tokens) in zip(scores, texts, strict=True)
            ]
        )

    change = drawn(after, "logprobs") - drawn(before, "logprobs")
    ratio = np.exp(change)
    moved = {
        side: np.abs(drawn(after, f"{side}_logprobs") - drawn(before, f"{side}_logprobs"))
        for side in ("base", "teacher")
    }
    return {
        "tokens": len(change),
        "kl": mean_and_error(ratio - 1 - change),
        "mean_log_ratio": mean_and_error(-change),
        "total_variation": mean_and_error(np.maximum(1 - ratio, 0)),
        "mean_abs_change": float(np.abs(change).mean()),
        "mean_abs_change_of": {side: float(one.mean()) for side, one in moved.items()},
        "mean_abs_change_alpha": float(
            np.abs(drawn(after, "alpha") - drawn(before, "alpha")).mean()
        ),
    }
