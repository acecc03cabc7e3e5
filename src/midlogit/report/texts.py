"""Single completions with what is known of each token, and tokens by type; knows columns, no page.

Which completions are shown is in the summaries: some at random, some at the extremes. Their lists are read from the
parts that hold them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from midlogit.report.results import Results
from midlogit.report.tokens import TokenTexts

if TYPE_CHECKING:
    import pyarrow as pa

RANDOM, EXTREME = 4, 2  # completions shown of each kind
PLACES = 20
CANDIDATES = 4
LISTS = (
    "alpha",
    "kl_base",
    "kl_teacher",
    "entropy",
    "logprobs",
    "base_logprobs",
    "teacher_logprobs",
    "forced",
)
TOP = tuple(
    f"top_{side}_{part}" for side in ("base", "q", "teacher") for part in ("ids", "logprobs")
)
COLUMNS = [
    "row_id", "sample", "prompt", "prompt_form", "text", "token_ids", "finish_reason", "completion_tokens",
    "mean_alpha", "mean_kl_base", "mean_kl_teacher", *LISTS, *TOP,
]  # fmt: skip
TYPED = ("token_ids", "kl_base", "alpha", "forced")
TYPES, LEAST_TYPE = (
    30,
    50,
)  # rows of the table of token types, and tokens that one needs to be in it


@dataclass(frozen=True, slots=True)
class Text:
    """A completion with its tokens.

    Attributes:
        why: it is shown: "random", "highest_kl", "nearest_base" or "nearest_teacher".
        row: its scalar columns. lists: per token, by column; empty where none are stored.
        pieces: the text of each token; None where the tokenizer is not known.
        top: candidates per token and side, as [id, log-probability]; None where none are stored.
    """

    why: str
    row: dict[str, Any]
    lists: dict[str, list[Any]]
    pieces: list[str] | None
    top: dict[str, list[list[list[Any]]]] | None

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the text, as JSON data."""
        scalars = {name: value for name, value in self.row.items() if name not in ("prompt_form",)}
        return {"why": self.why, **scalars, **self.lists, "pieces": self.pieces}


def chosen_texts(results: Results, texts: TokenTexts) -> list[Text]:
    """The completions that a report shows; the first reason counts for one with several."""
    wanted: dict[tuple[str, int], tuple[str, int]] = {}
    summary = results.summary
    groups = {"random": summary.get("examples", [])[:RANDOM]}
    groups |= {name: rows[:EXTREME] for name, rows in summary.get("extremes", {}).items()}
    for why, rows in groups.items():
        for row in rows:
            wanted.setdefault((row["row_id"], row["sample"]), (why, row["part"]))

    found = {}
    for part in sorted({part for _, part in wanted.values()}):
        keys = {key: why for key, (why, at) in wanted.items() if at == part}
        for key, row in _rows(results.parts[part].table(COLUMNS), set(keys)):
            found[key] = _text(keys[key], row, texts)
    return [found[key] for key in wanted if key in found]


def _rows(
    table: pa.Table, keys: set[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    names, samples = table.column("row_id").to_pylist(), table.column("sample").to_pylist()
    for number, key in enumerate(zip(names, samples, strict=True)):
        if key in keys:
            yield key, table.slice(number, 1).to_pylist()[0]


def _text(why: str, row: dict[str, Any], texts: TokenTexts) -> Text:
    lists = {name: row.pop(name) for name in ("token_ids", *LISTS) if name in row}
    top = None
    if "top_q_ids" in row:
        top = {
            side: [
                [list(pair) for pair in zip(ids[:CANDIDATES], logprobs[:CANDIDATES], strict=True)]
                for ids, logprobs in zip(
                    row.pop(f"top_{side}_ids"), row.pop(f"top_{side}_logprobs"), strict=True
                )
            ]
            for side in ("base", "q", "teacher")
        }
    return Text(why, row, lists, texts.pieces(lists["token_ids"], row["text"]), top)


def shown_prompt(prompt: str | None, form: str | None) -> str:
    """A prompt as a reader sees it: messages as "role: content", ids as their number."""
    if prompt is None or form == "text":
        return prompt or ""
    data = json.loads(prompt)
    if form == "token_ids":
        return f"{len(data):,} token ids"
    return "\n".join(f"{m.get('role', '')}: {_content(m.get('content'))}" for m in data)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content)
    return "" if content is None else str(content)


def places(results: Results, texts: TokenTexts) -> list[dict[str, Any]]:
    """The positions where the models disagree most, with the tokens before them as text."""
    found = []
    for place in results.summary.get("highest_kl", [])[:PLACES]:
        *before, drawn = place["token_ids"]
        names = [texts.name(token_id) for token_id in before]
        found.append(
            {
                **{name: value for name, value in place.items() if name not in ("part", "top")},
                "before": ("" if texts.is_known else " ").join(names),
                "token": texts.name(drawn),
                "candidates": {
                    side: [[texts.name(token_id), logprob] for token_id, logprob in candidates]
                    for side, candidates in place.get("top", {}).items()
                },
            }
        )
    return found


def token_types(results: Results, parts: list[int], texts: TokenTexts) -> dict[str, Any]:
    """Tokens by type over the unforced tokens of some parts, those with the largest Σ KL to the base.

    Returns:
        parts, tokens, and types: token_id, token, count, mean_kl, share of the Σ KL of all tokens, mean_alpha.
    """
    counts, kls, alphas = np.zeros(0), np.zeros(0), np.zeros(0)
    for part in parts:
        table = results.parts[part].table(list(TYPED))
        ids, kl, alpha, forced = (_values(table, name) for name in TYPED)
        free = ~forced & np.isfinite(kl)
        size = max(len(counts), int(ids.max(initial=-1)) + 1)
        counts, kls, alphas = (
            np.pad(array, (0, size - len(array))) for array in (counts, kls, alphas)
        )
        counts += np.bincount(ids[free], minlength=size)
        kls += np.bincount(ids[free], kl[free], minlength=size)
        alphas += np.bincount(ids[free], alpha[free], minlength=size)

    often = np.flatnonzero(counts >= LEAST_TYPE)
    order = often[np.argsort(-kls[often], kind="stable")][:TYPES]
    total = max(float(kls.sum()), 1e-300)
    return {
        "parts": len(parts),
        "tokens": int(counts.sum()),
        "types": [
            {
                "token_id": int(i),
                "token": texts.name(int(i)),
                "count": int(counts[i]),
                "mean_kl": float(kls[i] / counts[i]),
                "share": float(kls[i]) / total,
                "mean_alpha": float(alphas[i] / counts[i]),
            }
            for i in order
        ],
    }


def _values(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = (
        table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    )
    return values
