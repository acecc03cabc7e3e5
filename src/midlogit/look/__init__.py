"""How a text is coloured and hovered over: one source for the live page, reports and the terminal.

Knows α, KL, HTML and colours; no engine, no results. Hue says α, from the base's blue to the teacher's orange. Strength
says the KL divergence: where the models agree, α hardly matters and the text stays pale.
"""

from __future__ import annotations

import json
from colorsys import hls_to_rgb
from importlib.resources import files
from math import copysign, exp, isfinite

STEPS = 100  # of α, a colour each
SHADES = 9  # of the KL divergence, above none
KL_SCALE = 0.15  # nats, at which a token has about two thirds of its full strength

LIGHT = {
    "paper": "#fbfaf8", "card": "#ffffff", "ink": "#1d1c22", "soft": "#6b6875", "line": "#e5e2dc", "wash": "#f3f1ec",
    "base": "#3a74e0", "teacher": "#d86f0a", "middle": "#9a55c0", "other": "#0f8a7e", "good": "#2c8a4b",
    "warn": "#b86a00", "bad": "#c22f2f",
}  # fmt: skip
DARK = {
    "paper": "#131217", "card": "#1c1a22", "ink": "#efedf3", "soft": "#a5a0b1", "line": "#312e3a", "wash": "#25222d",
    "base": "#6b9cff", "teacher": "#ffa24a", "middle": "#c48be6", "other": "#3cc4b4", "good": "#5fce85",
    "warn": "#f0b04a", "bad": "#ff8585",
}  # fmt: skip


def lean(alpha: float) -> float:
    """−1 for the base, 1 for the teacher; steep near ½, where most α are."""
    return copysign(abs(2 * alpha - 1) ** 0.6, alpha - 0.5)


def rgb(alpha: float) -> tuple[int, int, int]:
    """The colour of an α."""
    towards = lean(min(max(alpha, 0.0), 1.0))
    parts = hls_to_rgb((301 + 85 * towards) % 360 / 360, 0.6, 0.48 + 0.42 * abs(towards))
    red, green, blue = (round(255 * part) for part in parts)
    return red, green, blue


def tone(alpha: float) -> str:
    """The colour of an α, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*rgb(alpha))


def token_class(alpha: float, kl: float) -> str:
    """The classes of a token of a text, for `css`.

    Args:
        kl: the larger of its two divergences, in nats; infinite where the models have no token in common.
    """
    shade = round(SHADES * (1 - exp(-max(kl, 0.0) / KL_SCALE))) if isfinite(kl) else SHADES
    return f"t a{round(STEPS * min(max(alpha, 0.0), 1.0))} k{shade}"


def css() -> str:
    """Colours, and the styles of coloured texts, legends and the hover."""
    tones = "".join(f".a{k}{{--t:{tone(k / STEPS)}}}" for k in range(STEPS + 1))
    shades = "".join(
        f".k{k}{{--o:{round(7 + 48 * k / SHADES)}%;--u:{round(25 + 75 * k / SHADES)}%}}"
        for k in range(SHADES + 1)
    )
    ramp = ", ".join(tone(k / 20) for k in range(21))
    return "\n".join(
        [
            f":root {{ color-scheme: light dark; {_variables(LIGHT)}"
            f" --ramp: linear-gradient(90deg, {ramp}); --shadow: 0 1px 2px #0000000d, 0 8px 28px #0000000f; }}",
            f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)}"
            " --shadow: 0 1px 2px #0006, 0 8px 28px #0005; }}",
            _read("look.css").strip(),
            tones,
            shades,
        ]
    )


def script() -> str:
    """The functions of pages that colour texts and show what is known of a token."""
    facts = {
        "tones": [tone(k / STEPS) for k in range(STEPS + 1)],
        "shades": SHADES,
        "scale": KL_SCALE,
    }
    return f"const LOOK = {json.dumps(facts)};\n{_read('look.js').strip()}"


def filled(page: str) -> str:
    """A page with styles and script in the places that it marks for them."""
    return page.replace("/* look.css */", css()).replace("/* look.js */", script())


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _read(name: str) -> str:
    return (files("midlogit.look") / name).read_text(encoding="utf-8")
