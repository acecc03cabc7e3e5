"""The sections of a run's page, each from its numbers and pictures; knows what is said, no statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from midlogit.look import tone
from midlogit.report import html
from midlogit.report.coloured import LEGEND, Coloured
from midlogit.report.html import estimate, number
from midlogit.report.numbers import Numbers
from midlogit.report.picture import Picture, percent
from midlogit.report.texts import Text, shown_prompt

WHY = {
    "random": "at random",
    "highest_kl": "highest mean KL",
    "nearest_base": "nearest the base",
    "nearest_teacher": "nearest the teacher",
}
PLACES = 12


def alpha(run: Numbers, pictures: Sequence[Picture], static: bool) -> str:
    found = run["alpha"]
    if not found or found["mean"]["mean"] is None:
        return ""
    q = found["quantiles"]
    lead = (
        f"α is the teacher's weight at a token. Its mean is {estimate(found['mean'])}; half of all tokens lie between "
        f"<b>{number(q['25'])}</b> and <b>{number(q['75'])}</b>, nine in ten between <b>{number(q['5'])}</b> and "
        f"<b>{number(q['95'])}</b>. {percent(found['at_base'])} lie at 0, {percent(found['at_teacher'])} at 1; "
        f"{percent(found['forced'])} were forced to the teacher and are left out here."
    )
    return html.section(
        "alpha", "α: which model leads", lead, html.figures(pictures, ["alpha"], titles=static)
    )


def kl(run: Numbers, pictures: Sequence[Picture], static: bool) -> str:
    found = run["kl"]
    if not found or found["base"]["mean"]["mean"] is None:
        return ""
    q = found["base"]["quantiles"]
    lead = (
        f"The KL divergence from q* to the base is {estimate(found['base']['mean'])} nats per token, to the teacher "
        f"{estimate(found['teacher']['mean'])}. The median to the base is <b>{_tiny(q['50'])}</b>, the 95% quantile "
        f"<b>{_tiny(q['95'])}</b>; a completion's largest is {estimate(found['largest']['mean'])} on average."
    )
    notes = []
    if not found["self_test"]["applies"]:
        notes.append(
            html.note(
                f"The rule is <b>{escape(run['rule'])}</b>, under which the two divergences need not be equal."
            )
        )
    if found["no_common_token"]:
        notes.append(
            html.note(
                f"At {found['no_common_token']:,} tokens the models had no token in common; q* is the teacher there."
            )
        )
    return html.section(
        "kl",
        "KL: how far from each model",
        lead,
        *notes,
        html.figures(pictures, ["kl"], titles=static),
    )


def ess(run: Numbers, pictures: Sequence[Picture], static: bool) -> str:
    found = run["ess"]
    if not found:
        return ""
    whole = found["sequences"]
    lead = (
        "How far the data can be re-weighted to one of the models. "
        f"Weights of whole completions, exp(Σ log p − log q), have an effective sample size of "
        f"<b>{percent(whole['base'])}</b> of {whole['count']:,} towards the base and "
        f"<b>{percent(whole['teacher'])}</b> towards the teacher."
    )
    if found["per_token"]:
        lead += (
            f" Per token it is {estimate(found['per_token']['base']['mean'])} and "
            f"{estimate(found['per_token']['teacher']['mean'])}."
        )
    return html.section(
        "ess", "ESS: what weights are worth", lead, html.figures(pictures, ["ess"], titles=static)
    )


def lengths(run: Numbers, pictures: Sequence[Picture], static: bool) -> str:
    found = run["lengths"]
    if not found or not found["mean"]["count"]:
        return ""
    reasons = ", ".join(
        f"<b>{percent(entry['share'])}</b> {escape(reason)}"
        for reason, entry in sorted(
            found["finish_reasons"].items(), key=lambda item: -item[1]["count"]
        )
    )
    lead = (
        f"A completion has {estimate(found['mean'])} tokens. They ended by: {reasons}. Inside a completion "
        f"{estimate(_scaled(found['repetition']), '%')} of 4-grams had occurred before"
    )
    identical = found["identical"]
    if identical["rows"]:
        lead += f"; <b>{percent(identical['share'])}</b> of completions say what another of their prompt says"
    return html.section(
        "lengths",
        "Lengths, ends, repetition",
        lead + ".",
        html.figures(pictures, ["lengths"], titles=static),
    )


def shown_texts(texts: Sequence[Text], coloured: Coloured) -> str:
    if not texts:
        return ""
    notes = ""
    if any(text.pieces is None and text.lists.get("alpha") for text in texts):
        notes = html.note(
            "The teacher's tokenizer is not at hand, so each square below a text is a token of it. Name it by "
            "<code>--tokenizer</code>."
        )
    cards = [_text(text, coloured) for text in texts]
    lead = "Some at random, and those at the extremes: by mean KL, and by which model finds them likelier per token."
    return html.section(
        "texts", "Texts", lead, notes, LEGEND, f'<div class="texts">{"".join(cards)}</div>'
    )


def _text(text: Text, coloured: Coloured) -> str:
    row = text.row
    parts = [
        f"<b>{WHY[text.why]}</b>",
        f"row <code>{escape(row['row_id'])}</code>, sample {row['sample']}",
    ]
    parts += text_facts(row)
    prompt = escape(shown_prompt(row.get("prompt"), row.get("prompt_form")))
    head = "".join(f"<span>{part}</span>" for part in parts)
    return (
        f'<article class="card"><div class="head">{head}</div><div class="prompt">{prompt}</div>'
        f"{coloured.html(text)}</article>"
    )


def text_facts(row: dict[str, Any]) -> list[str]:
    """What is said of a completion beside its name."""
    said = [f"{row['completion_tokens']:,} tokens, {escape(row['finish_reason'])}"]
    if row["mean_alpha"] is not None:
        said.append(f"mean α {row['mean_alpha']:.3f}")
        said.append(f"KL {_tiny(row['mean_kl_base'])} and {_tiny(row['mean_kl_teacher'])}")
    return said


def disagreements(run: Numbers) -> str:
    found = run["disagreements"]
    if not found or not found["places"]:
        return ""
    shown = found["places"][:PLACES]
    lead = f"The {len(shown)} tokens at which q* is furthest from the models, with what each would have said."
    if not shown[0]["candidates"]:
        lead = (
            f"The {len(shown)} tokens at which q* is furthest from the models, with their probabilities. What else the "
            "models would have said is stored with <code>--top-logprobs</code>."
        )
    cards = f'<div class="places">{"".join(map(_place, shown))}</div>'
    return html.section(
        "disagreements", "Where the models disagree most", lead, cards, _types(found["types"])
    )


def _place(place: dict[str, Any]) -> str:
    alpha = place["alpha"]
    head = (
        f'<div class="head"><span><b>KL {place["kl"]:.2f}</b></span><span>α {alpha:.3f}</span>'
        f"<span>row <code>{escape(place['row_id'])}</code>, sample {place['sample']}, token "
        f"{place['position'] + 1}</span></div>"
    )
    drawn = f'<i class="t a{round(100 * alpha)} k9">{escape(place["token"])}</i>'
    sides = (
        ("base", 0.0, "base_logprob"),
        ("q", alpha, "logprob"),
        ("teacher", 1.0, "teacher_logprob"),
    )
    rows = []
    for side, at, own in sides:
        candidates = place["candidates"].get(side) or [[place["token"], place[own]]]
        cells = "".join(
            f"<td>{_candidate(name, lp, place['token'])}</td>" for name, lp in candidates[:3]
        )
        rows.append(
            f'<tr><th style="color:{tone(at)}">{"q*" if side == "q" else side}</th>{cells}</tr>'
        )
    return (
        f'<article class="card place">{head}<p>…{escape(place["before"])}{drawn}</p>'
        f"<table><tbody>{''.join(rows)}</tbody></table></article>"
    )


def _candidate(name: str, logprob: float | None, drawn: str) -> str:
    words = escape(name.replace("\n", "⏎").replace(" ", "␣"))
    share = "–" if logprob is None else f"{math.exp(logprob):.2f}"
    return f"{share} <b>{words}</b>" if name == drawn else f"{share} {words}"


def _types(types: dict[str, Any] | None) -> str:
    if types is None:
        return html.note(
            "Add <code>--deep</code> for the token types that carry most of the KL divergence."
        )
    if not types["types"]:
        return html.note("No token occurs 50 times in the parts that were read.")
    most = max(entry["share"] for entry in types["types"])
    rows = [
        (
            f"<code>{escape(entry['token'].replace(chr(10), '⏎').replace(' ', '␣'))}</code>",
            f"{entry['count']:,}",
            number(entry["mean_kl"]),
            number(entry["mean_alpha"]),
            percent(entry["share"]),
            f'<span class="bar" style="width:{max(100 * entry["share"] / most, 1):.0f}px"></span>',
        )
        for entry in types["types"]
    ]
    header = ("token", "count", "mean KL, nats", "mean α", "share of Σ KL", "")
    said = (
        f"<h3>Token types by Σ KL to the base</h3><p class='hint'>Over {types['tokens']:,} unforced tokens of "
        f"{types['parts']:,} parts drawn at random; types that occur at least 50 times.</p>"
    )
    return f'<div class="card" style="margin-top:18px">{said}{html.table(header, rows, (1, 2, 3, 4))}</div>'


def exactness(run: Numbers, pictures: Sequence[Picture], static: bool) -> str:
    found = run["exactness"]
    if not found:
        return ""
    if found["is_exact"]:
        lead = "Both models' whole vocabularies were seen at every token: bounds are 0, and the sampled law is exact."
        return html.section("exactness", "Coverage and certified bounds", lead)
    bound = found["whole_texts"]
    lead = (
        f"Servers list only some tokens: their lists cover {estimate(found['coverage'])} of the mass. The law of "
        f"whole texts is proved to be within E[Σ bound] = {estimate(bound)} of the exact one in total variation"
        f"{', which above 1 proves nothing' if (bound['mean'] or 0) > 1 else ''}. "
        f"<b>{percent(found['above_0.01'])}</b> of tokens have a bound above 0.01, "
        f"<b>{percent(found['above_0.05'])}</b> above 0.05; α is off by at most {estimate(found['alpha_bound'])} on "
        "average."
    )
    notes = []
    if found["base_bounded"] or found["teacher_bounded"]:
        notes.append(
            html.note(
                f"The log-probability of the drawn token is only an upper bound at {percent(found['base_bounded'])} "
                f"of tokens for the base and {percent(found['teacher_bounded'])} for the teacher; weights towards them "
                "are upper bounds too."
            )
        )
    shown = html.figures(pictures, ["exactness"], titles=static)
    return html.section("exactness", "Coverage and certified bounds", lead, *notes, shown)


def errors(run: Numbers) -> str:
    found = run["errors"]
    if not found["count"]:
        return ""
    rows = [
        (
            f"{kind['count']:,}",
            f'<span class="wide">{escape(kind["kind"])}</span>',
            "<br>".join(
                f"<code>{escape(e['row_id'])}</code> {escape(e['error'][:160])}"
                for e in kind["examples"]
            ),
        )
        for kind in found["kinds"]
    ]
    lead = (
        f"<b>{found['count']:,}</b> completions ended as errors, {percent(found['share'])} of all. "
        "They are in no other number."
    )
    return html.section(
        "errors",
        "Errors",
        lead,
        f'<div class="card">{html.table(("count", "kind", "examples"), rows, (0,))}</div>',
    )


def _scaled(found: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if found[key] is None else 100 * found[key] for key in ("mean", "low", "high")
    }


def _tiny(value: float | None) -> str:
    return "–" if value is None else "≤1e-8" if value < 1.2e-8 else number(value, 2)
