"""Draws pictures as SVG for a page, and as files for papers, by vl-convert; knows colours and ids, no numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from midlogit.extras import require
from midlogit.jobs.files import write_whole
from midlogit.look import LIGHT
from midlogit.report.picture import Picture
from midlogit.report.vega import Spec, printed

WIDE, NARROW, PAPER = 520, 320, 420  # pixels: on a desk, on a phone, in a column of a paper
NAMES = {value: name for name, value in LIGHT.items() if name != "card"}


def drawn(spec: Spec) -> str:
    """A specification as SVG.

    Raises:
        MissingExtra: vl-convert is not installed.
    """
    svg: str = require("vl_convert", "report").vegalite_to_svg(json.dumps(spec))
    return svg


def inline(picture: Picture, *, titles: bool) -> str:
    """A picture as SVG for a page, wide and narrow; the page shows the one that fits.

    Colours become those of the page, so that they follow its scheme.

    Args:
        titles: what marks say becomes their title, which browsers show without a script.
    """
    return "".join(
        _for_page(drawn(picture.spec(width)), f"{picture.name}-{kind}", kind, picture.title, titles)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    )


def write_figures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Writes each picture as SVG, PDF, PNG at twice its size, and Vega-Lite.

    Raises:
        MissingExtra: vl-convert is not installed. OSError: the folder cannot be written.
    """
    convert = require("vl_convert", "report")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures:
        spec = printed(picture.spec(PAPER))
        text = json.dumps(spec)
        on_white = {**spec, "background": "white"}
        contents = {
            "svg": convert.vegalite_to_svg(text).encode(),
            "pdf": convert.vegalite_to_pdf(text),
            "png": convert.vegalite_to_png(json.dumps(on_white), scale=3),
            "vl.json": json.dumps(spec, indent=1, ensure_ascii=False).encode(),
        }
        for suffix, content in contents.items():
            path = folder / f"{picture.name}.{suffix}"
            write_whole(path, content)
            written.append(path)
    return written


def _for_page(svg: str, name: str, kind: str, title: str, titles: bool) -> str:
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r' font-family="[^"]*"', "", svg)
    svg = re.sub(
        r'="(#[0-9a-f]{6})"', lambda m: f'="var(--{NAMES[m[1]]})"' if m[1] in NAMES else m[0], svg
    )
    svg = re.sub(
        r'<g class="mark-group role-axis" role="graphics-symbol"[^>]*>',
        '<g aria-hidden="true">',
        svg,
    )
    svg = re.sub(
        r'<svg [^>]*width="([\d.]+)" height="([\d.]+)"[^>]*>',
        rf'<svg class="{kind}" role="img" aria-label="{escape(title, quote=True)}" viewBox="0 0 \1 \2">',
        svg,
        count=1,
    )
    svg = re.sub(r' (aria-roledescription|role)="[^"]*"(?=[^>]* aria-label)', "", svg)
    if titles:
        svg = re.sub(
            r'<(path|rect) aria-label="([^"]*)"([^>]*)/>|<(path|rect) aria-label="([^"]*)"([^>]*)></\4>',
            _titled,
            svg,
        )
    return svg


def _titled(found: re.Match[str]) -> str:
    tag, label, rest = (
        (found[1], found[2], found[3]) if found[1] else (found[4], found[5], found[6])
    )
    return f"<{tag}{rest}><title>{label}</title></{tag}>"
