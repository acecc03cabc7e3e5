"""Pieces of HTML that the pages of reports are made of; knows tags and how numbers are written, no section."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from midlogit.look import filled
from midlogit.report.checks import Check
from midlogit.report.drawing import NAMES, inline
from midlogit.report.picture import Picture


def read(name: str) -> str:
    """A file of this folder."""
    return (files("midlogit.report") / name).read_text(encoding="utf-8")


def page(title: str, body: str, data: str | None) -> str:
    """A whole page.

    Args:
        data: JSON for the script; None for a page without any.
    """
    content = filled(read("page.html").replace("/* page.css */", read("page.css")))
    scripts = ""
    if data is not None:
        # "<" is escaped so that no text can end the element.
        safe = (
            data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        )
        script = filled("/* look.js */\n") + read("page.js")
        scripts = (
            f'<div id="tip" role="tooltip"></div>\n<script type="application/json" id="data">{safe}</script>\n'
            f"<script>\n{script}</script>"
        )
    parts = {"{title}": escape(title), "{body}": body, "{scripts}": scripts}
    for mark, part in parts.items():
        content = content.replace(mark, part, 1)
    return content


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, whole ones in full."""
    if value is None:
        return "–"
    if isinstance(value, int) or (
        float(value).is_integer() and abs(value) < 1e15 and abs(value) >= 1
    ):
        return f"{int(value):,}".replace("-", "−")
    if not math.isfinite(value):
        return "∞"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    if value and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def estimate(found: Mapping[str, Any], unit: str = "") -> str:
    """A mean with its interval, rounded to what the interval tells."""
    mean, low, high = found["mean"], found["low"], found["high"]
    if mean is None:
        return "–"
    if low is None or high == low:
        return f"<b>{number(mean, 4)}{unit}</b>"
    digits = decimals(high - low)
    low_high = f"{low:.{digits}f} to {high:.{digits}f}".replace("-", "−")
    mean_said = f"{mean:,.{digits}f}".replace("-", "−")
    return f"<b>{mean_said}{unit}</b> <small>({low_high})</small>"


def decimals(width: float) -> int:
    """The decimals at which an interval of some width has two digits."""
    return min(max(1 - math.floor(math.log10(width / 2)), 0), 8) if width > 0 else 3


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Figures in a row: (label, HTML)."""
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{value}</dd></div>" for label, value in entries
    )
    return f'<dl class="facts">{cells}</dl>'


def pairs(entries: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they are: (name, HTML)."""
    return (
        '<dl class="pairs">'
        + "".join(f"<dt>{escape(n)}</dt><dd>{v}</dd>" for n, v in entries)
        + "</dl>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table of HTML cells; it scrolls by itself where it is too wide.

    Args:
        numeric: the columns that are set flush right.
    """
    right = set(numeric)

    def line(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=n' if k in right else ''}>{cell}</{tag}>"
                for k, cell in enumerate(cells)
            )
            + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def figures(pictures: Sequence[Picture], sections: Sequence[str], *, titles: bool) -> str:
    """The pictures of some sections side by side, three in a row where two would leave a gap."""
    own = [picture for picture in pictures if picture.section in sections]
    if not own:
        return ""
    has_keys = any(picture.key for picture in own)
    shown = "".join(_figure(picture, titles, has_keys) for picture in own)
    return f'<div class="figures{" three" if len(own) == 3 else ""}">{shown}</div>'


def _figure(picture: Picture, titles: bool, has_keys: bool) -> str:
    """A picture with its title, its key and how it is read.

    Args:
        has_keys: whether a picture beside it has a key, so that all keep a line for it.
    """
    key = "".join(
        f'<span class="key{" dots" if dashed else ""}" style="--c:{_variable(colour)}">{escape(words)}</span>'
        for colour, words, dashed in picture.key
    )
    keys = f'<div class="keys">{key}</div>' if has_keys else ""
    return (
        f'<figure class="card" id="{picture.name}"><h3>{escape(picture.title)}</h3>'
        f"{keys}{inline(picture, titles=titles)}"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def section(name: str, title: str, lead: str, *content: str) -> str:
    """A section with its heading and one sentence of what it says."""
    heading = f'<h2>{escape(title)}</h2><p class="lead">{lead}</p>'
    return f'<section id="{name}-section">{heading}{"".join(content)}</section>'


def check_list(found: Sequence[Check]) -> str:
    """Findings as a list."""
    marks = {"good": "✓", "look": "!", "bad": "✕"}
    return (
        '<ul class="checks">'
        + "".join(
            f'<li class="{check.state}"><span>{marks[check.state]}</span><div><b>{escape(check.name)}</b> '
            f"{escape(check.says)}</div></li>"
            for check in found
        )
        + "</ul>"
    )


def note(words: str) -> str:
    """A remark on what the page does not show, and why."""
    return f'<p class="note">{words}</p>'


def _variable(colour: str) -> str:
    return f"var(--{NAMES[colour]})" if colour in NAMES else colour
