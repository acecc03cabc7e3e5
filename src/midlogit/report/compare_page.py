"""The page of two runs: what differs, by how much, and where; knows what is said, no statistics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from midlogit.report import html
from midlogit.report.checks import checks
from midlogit.report.coloured import LEGEND, Coloured
from midlogit.report.compare_charts import is_sure
from midlogit.report.numbers import Numbers
from midlogit.report.page import made_on
from midlogit.report.picture import Picture, percent
from midlogit.report.sections import text_facts
from midlogit.report.texts import Text, shown_prompt


def compare_page(
    numbers: Numbers,
    texts: Sequence[Sequence[Text]],
    coloured: Coloured,
    pictures: Sequence[Picture],
    *,
    static: bool,
) -> str:
    """The page of two runs.

    Args:
        static: without a script.
    """
    runs, found = numbers["runs"], numbers["comparison"]
    names = [run["head"]["name"] for run in runs]
    first, second = (
        f'<i class="{css}">{escape(name)}</i>'
        for css, name in zip(("first", "second"), names, strict=True)
    )
    head = (
        f"<header><h1><b>{escape(names[0])}</b> and <b>{escape(names[1])}</b></h1>{made_on()}</header>"
        f'<p class="models">{first} against {second}: differences are the second less the first</p>'
    )
    shown = {
        "differences": ("Differences", _differences(found, names, pictures, static)),
        "position": ("Along the text", _positions(found, pictures, static)),
        "distributions": ("Distributions", _distributions(pictures, static)),
        "texts": ("Texts", _texts(texts, coloured, names)),
    }
    links = "".join(
        f'<a href="#{name}-section">{title}</a>' for name, (title, part) in shown.items() if part
    )
    body = [
        head,
        _facts(found),
        _top(runs, found, names),
        f"<nav>{links}</nav>",
        *(part for _, part in shown.values()),
    ]
    body.append(
        "<footer>Intervals are 95%, by clusters of rows: the samples of a row share its prompt. p-values are adjusted "
        "by Holm for the number of metrics. Each run alone: <code>midlogit report RUN</code>.</footer>"
    )
    title = f"{names[0]} and {names[1]} · midlogit report"
    return html.page(title, "\n".join(body), None if static else coloured.data())


def _facts(found: Numbers) -> str:
    texts, one, two = found["texts"], found["only_first"], found["only_second"]
    entries = [
        ("matched completions", f"{found['matched']:,}<small>of {found['rows']:,} rows</small>"),
        (
            "in one run only",
            f"{one + two:,}<small>{one:,} and {two:,}</small>",
        ),
    ]
    if texts:
        entries.append(("identical texts", percent(texts["identical"])))
        entries.append(
            (
                "texts part at token",
                "–"
                if texts["median"] is None
                else f"{texts['median'] + 1:.0f}<small>median of those that part</small>",
            )
        )
    sure = sum(map(is_sure, found["metrics"]))
    entries.append(
        ("metrics that differ", f"{sure}<small>of {len(found['metrics'])}, after Holm</small>")
    )
    entries.append(("same seed", "yes" if found["same_seed"] else "no"))
    return html.facts(entries)


def _top(runs: Sequence[Numbers], found: Numbers, names: Sequence[str]) -> str:
    cards = []
    if found["differing"]:
        rows = [
            (
                f"<code>{escape(entry['name'])}</code>",
                _value(entry["first"]),
                _value(entry["second"]),
            )
            for entry in found["differing"]
        ]
        cards.append(
            f'<div class="card"><h3>Parameters that differ</h3>{html.table(["", *map(escape, names)], rows)}</div>'
        )
    looked = [
        f"<h3>{escape(name)}</h3>{html.check_list([c for c in checks(run) if c.state != 'good']) or ''}"
        for name, run in zip(names, runs, strict=True)
        if any(c.state != "good" for c in checks(run))
    ]
    if looked:
        cards.append(f'<div class="card">{"".join(looked)}</div>')
    return f'<div class="top">{"".join(cards)}</div>' if cards else ""


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"<code>{escape(text if len(text) <= 60 else text[:60] + '…')}</code>"


def _differences(
    found: Numbers, names: Sequence[str], pictures: Sequence[Picture], static: bool
) -> str:
    if not found["metrics"]:
        return html.note("There is nothing to compare: a run has no finished completion.")
    rows = [_metric(metric) for metric in found["metrics"]]
    header = (
        "",
        escape(names[0]),
        escape(names[1]),
        "difference",
        "95% interval",
        "p (Holm)",
        "effect, SD",
        "r",
    )
    if found["matched"]:
        tests = "by flipping signs" if found["metrics"][0]["test"] == "sign flips" else "by t"
        lead = (
            f"Completions are matched by row and sample. Intervals are by clusters of rows, p-values {tests}. r is the "
            "correlation of the two runs over completions: the more, the narrower is a paired interval."
        )
    else:
        lead = "The runs have no row in common, so each mean has its own error, and p-values are by Welch over rows."
    if found["sample"]:
        sample = found["sample"]
        lead += (
            f" ESS and repetition, positions and texts are over the {sample['pairs']:,} pairs in {sample['parts']:,} "
            f"of {sample['of']:,} parts, drawn at random."
        )
    shown = html.table(header, rows, range(1, 8))
    return html.section(
        "differences",
        "Differences",
        lead,
        f'<div class="card">{shown}</div><br>',
        html.figures(pictures, ["differences"], titles=static),
    )


def _metric(metric: Numbers) -> tuple[str, ...]:
    digits = (
        html.decimals(metric["high"] - metric["low"])
        if metric["low"] is not None and metric["high"] > metric["low"]
        else 4
    )
    shown = f"{metric['difference']:+.{digits}f}".replace("-", "−")
    interval = "–"
    if metric["low"] is not None:
        interval = f"{metric['low']:.{digits}f} to {metric['high']:.{digits}f}".replace("-", "−")
    p = (
        "–"
        if metric["p_holm"] is None
        else "<0.001"
        if metric["p_holm"] < 0.001
        else f"{metric['p_holm']:.3f}"
    )
    correlation = (
        "–" if metric["correlation"] is None else f"{metric['correlation']:.2f}".replace("-", "−")
    )
    return (
        escape(metric["label"]),
        f"{metric['first']:,.{digits}f}".replace("-", "−"),
        f"{metric['second']:,.{digits}f}".replace("-", "−"),
        f'<span class="win">{shown}</span>' if is_sure(metric) else shown,
        interval,
        p,
        f"{metric['effect']:+.2f}".replace("-", "−"),
        correlation,
    )


def _positions(found: Numbers, pictures: Sequence[Picture], static: bool) -> str:
    shown = html.figures(pictures, ["position"], titles=static)
    if not shown:
        return ""
    lead = "Where in the text the runs differ, and where matched texts part."
    return html.section("position", "Along the text", lead, shown)


def _distributions(pictures: Sequence[Picture], static: bool) -> str:
    shown = html.figures(pictures, ["alpha", "kl", "ess", "lengths", "exactness"], titles=static)
    if not shown:
        return ""
    lead = "All finished completions of each run, matched or not."
    return html.section("distributions", "Distributions", lead, shown)


def _texts(texts: Sequence[Sequence[Text]], coloured: Coloured, names: Sequence[str]) -> str:
    """Completions that both pages would show, side by side."""
    second = {(text.row["row_id"], text.row["sample"]): text for text in texts[1]}
    cards = []
    for text in texts[0]:
        key = text.row["row_id"], text.row["sample"]
        if key not in second or text.why != "random":
            continue
        prompt = escape(shown_prompt(text.row.get("prompt"), text.row.get("prompt_form")))
        sides = "".join(
            f'<div><div class="head"><b>{escape(name)}</b><span>{" · ".join(text_facts(shown.row))}</span></div>'
            f"{coloured.html(shown)}</div>"
            for name, shown in zip(names, (text, second[key]), strict=True)
        )
        cards.append(
            f'<article class="card"><div class="head">row <code>{escape(key[0])}</code>, sample {key[1]}</div>'
            f'<div class="prompt">{prompt}</div><div class="side-by-side">{sides}</div></article>'
        )
    if not cards:
        return ""
    lead = "The same rows in both runs, drawn at random."
    return html.section(
        "texts", "Texts", lead, LEGEND, f'<div class="texts">{"".join(cards)}</div>'
    )
