"""Draws docs/demo.svg: the text of `midlogit demo`, coloured by α; knows the public API and SVG.

python docs/make_picture.py
"""

from __future__ import annotations

from html import escape
from math import exp
from pathlib import Path

from midlogit import Completion, Pair, SamplingParams, Token
from midlogit.look import lean, tone

PICTURE = Path(__file__).parent / "demo.svg"
PROMPT = "Tell me a short story about a fox."
PARAMS = SamplingParams.preset("balanced", temperature=0.8, max_tokens=120, seed=1, top_logprobs=3)

# Lengths in pixels. Every text gets its width from us, so that it fits whatever font the reader has.
WIDTH, MARGIN = 880, 30
INNER = WIDTH - 2 * MARGIN
SIZE, ADVANCE, LINE = 18, 10.8, 36
SMALL_SIZE, SMALL_ADVANCE, SMALL_LINE = 13, 7.8, 19
BARS = 76  # height of the chart

INK, SOFT, RULE = "#1d1c22", "#6b6875", "#dedbd4"


def main() -> None:
    tokens, names = sample()
    texts, text_height = coloured_text(tokens, top=78)
    chart = kl_chart(tokens, top=78 + text_height)
    columns = disagreements(tokens, names, top=78 + text_height + BARS + 72)
    height = 78 + text_height + BARS + 72 + 4 * SMALL_LINE + 8

    PICTURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">\n'
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="14" fill="#fff" stroke="{RULE}"/>\n'
        + "\n".join([*legend(), *texts, *chart, *columns])
        + "\n</svg>\n"
    )


def sample() -> tuple[list[Token], dict[int, str]]:
    """The tokens of the demo's completion that have text, and the names of all candidates by id."""
    with Pair.local() as pair:
        events = list(pair.stream(PROMPT, PARAMS, chat=True))
        tokens = [event for event in events if not isinstance(event, Completion) and event.text]

        name = pair.mixing.teacher.detokenizer.token
        names = {
            token_id: name(token_id).strip()
            for token in tokens
            if (top := token.decision.top)
            for candidates in (top.base, top.q, top.teacher)
            for token_id, _ in candidates
        }
    return tokens, names


def legend() -> list[str]:
    teacher = WIDTH - MARGIN - len("teacher α = 1") * SMALL_ADVANCE
    ramp = teacher - 160
    base = ramp - 10 - len("base α = 0") * SMALL_ADVANCE
    steps = [
        f'<rect x="{ramp + 5 * k:.1f}" y="31" width="5.5" height="10" fill="{tone(k / 29)}"/>'
        for k in range(30)
    ]
    return [
        small(PROMPT, MARGIN, 40, SOFT),
        small("base α = 0", base, 40, SOFT),
        *steps,
        small("teacher α = 1", teacher, 40, SOFT),
    ]


def coloured_text(tokens: list[Token], top: int) -> tuple[list[str], int]:
    """The shapes of the text, and its height."""
    per_line = int(INNER / ADVANCE)
    shapes, column, line = [], 0, 0
    for token in tokens:
        word = token.text.lstrip() if token.position == 0 else token.text
        if column + len(word) > per_line:
            column, line, word = 0, line + 1, word.lstrip()
        x, y, width = MARGIN + column * ADVANCE, top + line * LINE, len(word) * ADVANCE
        colour = tone(token.decision.alpha)
        opacity = 0.15 + 0.3 * abs(lean(token.decision.alpha))
        shapes += [
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="27" fill="{colour}" fill-opacity="{opacity:.2f}"/>',
            f'<rect x="{x:.1f}" y="{y + 25}" width="{width:.1f}" height="2" fill="{colour}"/>',
            text(word, x, y + 19, SIZE, ADVANCE, INK),
        ]
        column += len(word)
    return shapes, (line + 1) * LINE


def kl_chart(tokens: list[Token], top: int) -> list[str]:
    """A bar per token: KL(q‖base), which equals KL(q‖teacher) except at the forced token."""
    free = [token for token in tokens if not token.decision.forced]
    most = max(token.decision.kl_base for token in free)
    step = INNER / len(tokens)
    floor = top + 38 + BARS

    shapes = [small("KL from q* to each model per token, in nats", MARGIN, top + 24, SOFT)]
    for i, token in enumerate(tokens):
        height = 0 if token.decision.forced else BARS * token.decision.kl_base / most
        x = MARGIN + i * step
        shapes.append(
            f'<rect x="{x + 1:.1f}" y="{floor - height:.1f}" width="{step - 2:.1f}" height="{height:.1f}"'
            f' fill="{tone(token.decision.alpha)}"/>'
        )
        if token in furthest(tokens):
            label = f"{token.token.strip()} {token.decision.kl_base:.2f}"
            end = min(x, WIDTH - MARGIN - len(label) * SMALL_ADVANCE)
            shapes.append(small(label, end, floor - height - 6, INK))
    shapes.append(f'<rect x="{MARGIN}" y="{floor}" width="{INNER}" height="1" fill="{RULE}"/>')
    return shapes


def disagreements(tokens: list[Token], names: dict[int, str], top: int) -> list[str]:
    """The three tokens at which q* is furthest from both models, with the candidates of all three distributions."""
    shapes = []
    for n, token in enumerate(furthest(tokens)):
        x = MARGIN + n * INNER / 3
        before = "".join(t.text for t in tokens[: token.position]).split()[-4:]
        shapes.append(small(f"… {' '.join(before)} [{token.token.strip()}]", x, top, INK))
        candidates = token.decision.top
        assert candidates is not None
        for k, (name, alpha) in enumerate(
            (("base", 0.0), ("q", token.decision.alpha), ("teacher", 1.0)), start=1
        ):
            y = top + k * SMALL_LINE + 4
            said = ", ".join(
                f"{names[i]} {exp(logprob):.2f}" for i, logprob in getattr(candidates, name)[:2]
            )
            shapes += [
                small("q*" if name == "q" else name, x, y, tone(alpha)),
                small(said, x + 66, y, SOFT),
            ]
    return shapes


def furthest(tokens: list[Token]) -> list[Token]:
    """The three tokens with the largest KL, in the order of the text."""
    free = [token for token in tokens if not token.decision.forced]
    return sorted(sorted(free, key=lambda t: -t.decision.kl_base)[:3], key=lambda t: t.position)


def small(words: str, x: float, y: float, colour: str) -> str:
    return text(words, x, y, SMALL_SIZE, SMALL_ADVANCE, colour)


def text(words: str, x: float, y: float, size: int, advance: float, colour: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" xml:space="preserve"'
        f' textLength="{len(words) * advance:.1f}" lengthAdjust="spacingAndGlyphs">{escape(words)}</text>'
    )


if __name__ == "__main__":
    main()
