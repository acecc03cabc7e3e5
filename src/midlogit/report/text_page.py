"""The page of one text, coloured by α; knows tokens of a stream, no runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from midlogit.look import tone
from midlogit.outputs import Completion, Token
from midlogit.report import html
from midlogit.report.coloured import LEGEND, SIDES, Coloured
from midlogit.report.html import number
from midlogit.report.page import made_on
from midlogit.report.texts import Text
from midlogit.report.tokens import TokenTexts

CHARTS = """
<div class="chart"><h2>α <span class="key" style="--c:var(--middle)">0 is the base alone, 1 the teacher</span></h2>
<svg id="alpha-chart" class="curve" height="110" role="img" aria-label="α at each token"></svg></div>
<div class="chart"><h2>KL from q*, in nats <span class="key" style="--c:var(--base)">to base</span>
<span class="key dots" style="--c:var(--teacher)">to teacher</span></h2>
<svg id="kl-chart" class="curve" height="150" role="img" aria-label="Both KL divergences at each token"></svg></div>
"""


def text_page(
    prompt: str,
    tokens: Sequence[Token],
    completion: Completion,
    names: TokenTexts,
    alone: Mapping[str, str],
) -> str:
    """The page of a text that was streamed.

    Args:
        tokens: of the text, with candidates. alone: what each model would have written, by "base" and "teacher".
    """
    coloured = Coloured(names, titles=False)
    text = Text("random", {"text": completion.text}, _lists(tokens), _pieces(tokens), _top(tokens))
    others = "".join(
        f'<article class="card"><div class="head"><b style="color:{tone(alpha)}">the {side} alone</b></div>'
        f'<div class="text">{escape(alone[side].strip())}</div></article>'
        for side, alpha in (("base", 0.0), ("teacher", 1.0))
    )
    body = (
        f"<header><h1><b>midlogit</b></h1><p>one text, written by two models</p>{made_on()}</header>"
        f'<div class="prompt" style="margin-top:16px">{escape(prompt)}</div>{html.facts(_facts(tokens, completion))}'
        f'<section><div class="card">{LEGEND}{coloured.html(text, charts=True)}{CHARTS}</div></section>'
        f'<section class="texts"><h2>Same prompt, same seed</h2><div class="side-by-side">{others}</div></section>'
    )
    return html.page("midlogit · one text, written by two models", body, coloured.data())


def _lists(tokens: Sequence[Token]) -> dict[str, list[object]]:
    decisions = [token.decision for token in tokens]
    own = {
        "logprobs": "logprob",
        "base_logprobs": "base_logprob",
        "teacher_logprobs": "teacher_logprob",
    }
    same = ("alpha", "kl_base", "kl_teacher", "entropy", "forced")
    lists: dict[str, list[object]] = {"token_ids": [token.token_id for token in tokens]}
    lists |= {name: [getattr(d, name) for d in decisions] for name in same}
    return lists | {name: [getattr(d, field) for d in decisions] for name, field in own.items()}


def _pieces(tokens: Sequence[Token]) -> list[str]:
    return [token.text.lstrip() if token.position == 0 else token.text for token in tokens]


def _top(tokens: Sequence[Token]) -> dict[str, list[list[list[object]]]]:
    return {
        side: [[list(pair) for pair in getattr(token.decision.top, side)] for token in tokens]
        for side in SIDES
    }


def _facts(tokens: Sequence[Token], completion: Completion) -> list[tuple[str, str]]:
    free = [token.decision for token in tokens if not token.decision.forced]
    entries = [("tokens", f"{len(tokens)}<small>{completion.finish_reason}</small>")]
    if free:
        mean_kl = sum(d.kl_base for d in free) / len(free)
        worst = max(abs(d.kl_base - d.kl_teacher) for d in free)
        entries += [
            ("mean α", f"{sum(d.alpha for d in free) / len(free):.3f}"),
            ("mean KL to each, nats", f"{mean_kl:.4f}"),
            ("largest KL, nats", number(max(max(d.kl_base, d.kl_teacher) for d in free), 3)),
            ("largest |KL base − KL teacher|", f"{worst:.1e}"),
            ("mean entropy, nats", number(sum(d.entropy for d in free) / len(free), 3)),
        ]
    return entries
