"""The page of one run: what ran, what to look at, and its sections in order; knows numbers, no statistics."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from midlogit import __version__
from midlogit.report import html, sections
from midlogit.report.checks import checks
from midlogit.report.coloured import Coloured
from midlogit.report.html import number
from midlogit.report.numbers import Numbers
from midlogit.report.picture import Picture, percent
from midlogit.report.texts import Text

SECTIONS = {
    "alpha": "α",
    "kl": "KL",
    "ess": "ESS",
    "lengths": "Lengths",
    "texts": "Texts",
    "disagreements": "Disagreements",
    "exactness": "Exactness",
    "errors": "Errors",
}


def run_page(
    run: Numbers,
    texts: Sequence[Text],
    coloured: Coloured,
    pictures: Sequence[Picture],
    *,
    static: bool,
) -> str:
    """The page of a run.

    Args:
        static: without a script.
    """
    made = {
        "alpha": sections.alpha(run, pictures, static),
        "kl": sections.kl(run, pictures, static),
        "ess": sections.ess(run, pictures, static),
        "lengths": sections.lengths(run, pictures, static),
        "texts": sections.shown_texts(texts, coloured),
        "disagreements": sections.disagreements(run),
        "exactness": sections.exactness(run, pictures, static),
        "errors": sections.errors(run),
    }
    links = "".join(
        f'<a href="#{name}-section">{SECTIONS[name]}</a>' for name, part in made.items() if part
    )
    body = [_head(run), f"<nav>{links}</nav>" if links else "", *made.values(), _foot(run)]
    title = f"{run['head']['name']} · midlogit report"
    return html.page(title, "\n".join(body), None if static else coloured.data())


def model_name(name: str) -> str:
    """The name of a model as it was given, folders by their last part."""
    if not name:
        return ""
    return Path(name).name if name.startswith(("/", ".")) else name


def _head(run: Numbers) -> str:
    head, job = run["head"], run["head"]["job"]
    models = ""
    if job and job["base"]:
        models = (
            f'<p class="models">base <i class="base">{escape(model_name(job["base"]))}</i> · '
            f'teacher <i class="teacher">{escape(model_name(job["teacher"]))}</i></p>'
        )
    title = (
        f"<header><h1><b>{escape(head['name'])}</b></h1><p>what was sampled</p>"
        f"{made_on()}</header>{models}"
    )
    cards = [
        f'<div class="card"><h3>Before you train on it</h3>{html.check_list(checks(run))}</div>',
        f'<div class="card"><h3>What ran</h3>{html.pairs(_ran(run))}</div>',
    ]
    if not head["completions"]:
        return title + html.note(
            "No completion is finished yet. The page fills as the job goes on."
        )
    return f'{title}{html.facts(_facts(run))}{_state(run)}<div class="top">{"".join(cards)}</div>'


def _facts(run: Numbers) -> list[tuple[str, str]]:
    head = run["head"]
    done, planned = head["completions"], head["planned"]
    entries = [
        (
            "completions",
            f"{done:,}<small>of {head['rows']:,} rows{f', {planned:,} planned' if planned != done else ''}</small>",
        ),
        (
            "tokens",
            f"{head['completion_tokens']:,}<small>after {head['prompt_tokens']:,} of prompts</small>",
        ),
    ]
    if run["alpha"] and run["alpha"]["mean"]["mean"] is not None:
        entries.append(("mean α", _fact(run["alpha"]["mean"])))
        entries.append(("mean KL to each, nats", _fact(run["kl"]["base"]["mean"])))
    if run["lengths"] and run["lengths"]["mean"]["count"]:
        stop = run["lengths"]["finish_reasons"].get("stop", {}).get("share", 0.0)
        entries.append(("mean length", _fact(run["lengths"]["mean"])))
        entries.append(
            ("ended by themselves", f"{percent(stop)}<small>{head['errors']:,} errors</small>")
        )
    return entries


def _fact(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{number(found['mean'], 4)}<small>one row, no interval</small>"
    digits = html.decimals(found["high"] - found["low"])
    digits = min(digits, 4)
    return f"{found['mean']:,.{digits}f}<small>{found['low']:.{digits}f} to {found['high']:.{digits}f}</small>"


def _state(run: Numbers) -> str:
    head, said = run["head"], []
    if head["completions"] < head["planned"]:
        workers = (
            f"{head['workers']} workers are at it" if head["workers"] else "no worker is at it now"
        )
        said.append(
            f"<b>The job is not complete</b>: {head['parts_done']:,} of {head['parts']:,} parts are done and "
            f"{head['parts_open']:,} are open; {workers}. Long completions finish last, so lengths are biased until "
            "then."
        )
    if head["diagnostics"] == "none":
        said.append(
            "<b>The job stored no diagnostics per token</b>, so there is nothing to say of α, KL and ESS by token, of "
            "coverage, nor of where the models disagree. What follows comes from one number per completion."
        )
    if head["diagnostics"] == "compact":
        said.append(
            "Diagnostics per token are rounded to 16 bits of mantissa, five digits; log-probabilities are not."
        )
    if head["rows"] == 1:
        said.append(
            "<b>There is one row</b>, so no interval can be given: its samples share a prompt."
        )
    return "".join(map(html.note, said))


def _ran(run: Numbers) -> list[tuple[str, str]]:
    head, job = run["head"], run["head"]["job"]
    if job is None:
        return [
            ("input", "lines of <code>midlogit generate --json</code>"),
            ("completions", f"{head['completions']:,}"),
        ]
    sampling = job["sampling"]
    support = (
        f"teacher's top-p {sampling['target_top_p']}"
        if sampling["constraint_to_target"]
        else "whole vocabulary"
    )
    first = "first token from the teacher" if sampling["force_first_token"] else "no forced token"
    entries = [
        ("engine", escape(" ".join(filter(None, (job["engine"], job["dtype"]))))),
        ("rule", escape(sampling["alpha_rule"])),
        ("support", f"{support}, {first}"),
        ("temperature", number(sampling["temperature"])),
        ("n, max_tokens, seed", f"{sampling['n']}, {sampling['max_tokens']:,}, {sampling['seed']}"),
        ("prompts", "chat" if job["chat"] else "as given"),
        ("inputs", ", ".join(escape(name) for name in job["inputs"])),
    ]
    if head["seconds"]:
        speed = f", {number(head['tokens_per_s'])} tokens/s" if head["tokens_per_s"] else ""
        entries.append(("time", f"{_time(head['seconds'])} from the first part to the last{speed}"))
    if head["engine_deaths"]:
        entries.append(("engine deaths", f"{head['engine_deaths']:,}"))
    return [
        *entries,
        (
            "planned",
            f"{escape(job['created'][:16].replace('T', ' '))} by midlogit {escape(job['version'])}",
        ),
        ("fingerprint", f"<code>{job['fingerprint']}</code>"),
    ]


def _foot(run: Numbers) -> str:
    head = run["head"]
    sources = f"{head['parts_done']:,} footers" if head["job"] else f"{head['completions']:,} lines"
    remade = (
        f" The summaries of {head['summaries_remade']:,} parts, written by an older version, were made again from "
        "their rows."
        if head["summaries_remade"]
        else ""
    )
    return (
        f"<footer>Made from {sources}.{remade} Intervals are 95%, by clusters of rows: the samples of a row share its "
        "prompt. Quantiles come from histograms of 200 bins.</footer>"
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def made_on() -> str:
    """When a page was made, and by which version."""
    today = datetime.datetime.now().astimezone().strftime("%-d %B %Y")
    return f'<span class="made">{today} · midlogit {__version__}</span>'
