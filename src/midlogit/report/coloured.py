"""Texts coloured by α as HTML, with what the hover shows of each token; knows tokens, no runs and no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import orjson

from midlogit.look import token_class
from midlogit.report.texts import Text
from midlogit.report.tokens import TokenTexts

LEGEND = (
    '<div class="legend"><span>base</span><span class="ramp"></span><span>teacher</span>'
    '<span class="ramp-title">α, the teacher\'s weight; paler where the models agree; dotted where forced</span></div>'
)
SIDES = ("base", "q", "teacher")


class Coloured:
    """The texts of a page: their HTML, and the data of its script.

    Args:
        titles: what is known of a token becomes its title, for pages without a script.
    """

    def __init__(self, texts: TokenTexts, *, titles: bool) -> None:
        self._texts = texts
        self._titles = titles
        self._data: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}

    def html(self, text: Text, *, charts: bool = False) -> str:
        """A text; where its tokens' own texts are not known, the whole text over a strip of tokens.

        Args:
            charts: the page has curves of this text.
        """
        if not text.lists.get("alpha"):
            return f'<div class="text">{escape(text.row["text"])}</div>'

        number = len(self._data)
        self._data.append(self._lists(text))
        kind = ' data-charts=""' if charts else ""
        inside = (
            f'tabindex="0" role="textbox" aria-readonly="true" aria-multiline="true" data-text="{number}"{kind}'
            ' aria-label="Text; arrow keys walk through its tokens"'
        )
        if text.pieces is not None:
            spans = "".join(self._span(text, k, piece) for k, piece in enumerate(text.pieces))
            return f'<div class="text" {inside}>{spans}</div>'
        strip = "".join(self._span(text, k, "") for k in range(len(text.lists["alpha"])))
        return f'<div class="text">{escape(text.row["text"])}</div><div class="strip" {inside}>{strip}</div>'

    def data(self) -> str:
        """The lists of all texts as JSON, infinities as null."""
        return orjson.dumps(
            {"texts": self._data, "names": self._names}, option=orjson.OPT_NON_STR_KEYS
        ).decode()

    def _span(self, text: Text, k: int, piece: str) -> str:
        lists = text.lists
        alpha, forced = lists["alpha"][k], lists["forced"][k]
        classes = token_class(alpha, max(lists["kl_base"][k], lists["kl_teacher"][k]))
        title = ""
        if self._titles:
            title = f' title="α {alpha:.3f}, KL {_short(lists["kl_base"][k])} and {_short(lists["kl_teacher"][k])}"'
        return f'<i class="{classes}{" forced" if forced else ""}"{title}>{escape(piece)}</i>'

    def _lists(self, text: Text) -> dict[str, Any]:
        lists = text.lists
        ids = lists["token_ids"]
        own = [self._texts.name(i) for i in ids] if self._texts.is_known else [f"#{i}" for i in ids]
        if text.top:
            for candidates in (
                c for side in SIDES for position in text.top[side] for c in position
            ):
                self._names[candidates[0]] = self._texts.name(candidates[0])
        return {
            "token": own,
            "alpha": _rounded(lists["alpha"], 4),
            "base": _rounded(lists["kl_base"], 5),
            "teacher": _rounded(lists["kl_teacher"], 5),
            "entropy": _rounded(lists["entropy"], 3),
            "forced": [int(forced) for forced in lists["forced"]],
            "q": _rounded(lists["logprobs"], 3),
            "lp": _rounded(lists["base_logprobs"], 3),
            "lt": _rounded(lists["teacher_logprobs"], 3),
            "top": text.top and {side: [_candidates(c) for c in text.top[side]] for side in SIDES},
        }


def _candidates(candidates: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[token_id, round(logprob, 3)] for token_id, logprob in candidates]


def _rounded(values: Sequence[float], digits: int) -> list[float]:
    return [round(value, digits) if math.isfinite(value) else value for value in values]


def _short(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "∞"
