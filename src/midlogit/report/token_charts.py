"""Pictures of tokens: α, KL, ESS, coverage and bounds; knows numbers of runs, draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from midlogit.look import LIGHT
from midlogit.report.numbers import Numbers
from midlogit.report.picture import HEIGHT, Picture, fans, histograms, percent
from midlogit.report.vega import RUNS, SIDES, Spec, layer, powers, silent, view, x, y

KL_CAPTION = (
    "Each bar is the share of tokens at that divergence, on a logarithmic axis; the leftmost bar holds those on which "
    "the models agree. Under equal KL both curves are one, and its right end is where a text surprises both models "
    "alike."
)
SIDE_KEY = ((SIDES["base"], "base", False), (SIDES["teacher"], "teacher", True))


def alpha(runs: Sequence[Numbers], key: Any) -> Picture:
    series = [run["alpha"]["histogram"] for run in runs]

    def spec(width: int) -> Spec:
        across = x("from", "α of a token", scale={"domain": [0, 1]})
        rule = {"type": "rule", "strokeDash": [3, 3], "color": LIGHT["soft"]}
        middle = layer([{"at": 0.5}], silent(rule), x={**across, "field": "at"})
        return view([*histograms(series, across, "α"), middle], width, HEIGHT)

    return Picture(
        "alpha", "alpha", "α over all tokens",
        "Each bar is the share of tokens with that α: 0 is the base alone, 1 the teacher alone. Mass at the ends means "
        "that one model rules out what the other writes; a shift from ½ means that one is more certain than the other.",
        spec, key,
    )  # fmt: skip


def alpha_position(runs: Sequence[Numbers], key: Any) -> Picture:
    series = [run["alpha"]["by_position"] for run in runs]
    return Picture(
        "alpha_position", "alpha", "α along the text",
        "The line is the mean α at each position with its 95% interval; the bands hold the middle 50% and 90% of "
        "tokens. A drift shows that the models come apart, or agree, as the text grows.",
        lambda width: fans(series, "α", "α", width, [0, 1]), key,
    )  # fmt: skip


def alpha_entropy(runs: Sequence[Numbers], _: Any) -> Picture:
    cells = runs[0]["alpha"]["by_entropy"]
    most = max((cell["share"] for cell in cells), default=1)
    rows = [
        {
            "a": cell["alpha"], "a2": cell["alpha"] + 0.04, "e": cell["entropy"], "e2": cell["entropy"] + 0.25,
            "strength": 0.06 + 0.94 * math.sqrt(cell["share"] / most),
            "says": f"entropy {cell['entropy']:.2f} to {cell['entropy'] + 0.25:.2f}, α {cell['alpha']:.2f} to "
            f"{cell['alpha'] + 0.04:.2f}: {percent(cell['share'])} of tokens",
        }
        for cell in cells
    ]  # fmt: skip

    def spec(width: int) -> Spec:
        cell = layer(
            rows, {"type": "rect", "color": LIGHT["middle"]},
            x=x("e", "entropy of q*, nats", scale={"domain": [0, 6]}), x2={"field": "e2"},
            y=y("a", "α", scale={"domain": [0, 1]}), y2={"field": "a2"},
            opacity={"field": "strength", "type": "quantitative", "scale": None, "legend": None},
            description={"field": "says"},
        )  # fmt: skip
        return view([cell], width, HEIGHT)

    return Picture(
        "alpha_entropy", "alpha", "α by the entropy of q*",
        "The darker a cell, the more tokens have that entropy and that α. Where the next token is nearly certain, at "
        "the left, α says little; α far from ½ at high entropy is a real lean to one model.",
        spec,
    )  # fmt: skip


def kl(runs: Sequence[Numbers], key: Any) -> Picture:
    across = {**powers(-8, 2)}
    if len(runs) == 2:
        series = [run["kl"]["base"]["histogram"] for run in runs]
        return Picture(
            "kl", "kl", "KL from q* to the base, per token", KL_CAPTION,
            lambda width: view(histograms(series, x("from", "nats", **across), "KL", power=True), width, HEIGHT), key,
        )  # fmt: skip
    sides = [runs[0]["kl"][side]["histogram"] for side in ("base", "teacher")]

    def spec(width: int) -> Spec:
        channel = x("from", "nats", **across)
        return view(
            histograms(
                sides, channel, "KL", power=True, colours=tuple(SIDES.values()), dashed=True
            ),
            width,
            HEIGHT,
        )

    return Picture("kl", "kl", "KL from q* to each model, per token", KL_CAPTION, spec, SIDE_KEY)


def kl_position(runs: Sequence[Numbers], key: Any) -> Picture:
    series = [run["kl"]["base"]["by_position"] for run in runs]
    return Picture(
        "kl_position", "kl", "KL to the base along the text",
        "The line is the mean with its 95% interval, the bands hold the middle 50% and 90% of tokens. It says where "
        "in a text the two models disagree; a rise towards the end is common in texts that run on.",
        lambda width: fans(series, "nats", "KL", width, None), key,
    )  # fmt: skip


def self_test(runs: Sequence[Numbers], _: Any) -> Picture | None:
    test = runs[0]["kl"]["self_test"]
    if not (test["applies"] and test["tested"]):
        return None
    tolerance = math.log10(test["tolerance"])

    def spec(width: int) -> Spec:
        across = x("from", "nats", **powers(-12, 3))
        mark = [{"at": tolerance, "words": "tolerance"}]
        rule = {"type": "rule", "strokeDash": [4, 3], "color": LIGHT["bad"]}
        return view(
            [
                *histograms([test["histogram"]], across, "difference", power=True),
                layer(mark, silent(rule), x={**across, "field": "at"}),
                layer(
                    mark, silent({"type": "text", "align": "left", "dx": 5, "color": LIGHT["bad"]}),
                    x={**across, "field": "at"}, y={"value": 8}, text={"field": "words"},
                ),
            ],
            width, HEIGHT,
        )  # fmt: skip

    return Picture(
        "self_test", "kl", "Self-test: |KL base − KL teacher|",
        "q* is where both divergences are equal, so all mass should lie left of the solver's tolerance. The leftmost "
        "bar holds exact zeros; differences near 1e-8 are the rounding of the stored numbers.",
        spec,
    )  # fmt: skip


def ess_token(runs: Sequence[Numbers], key: Any) -> Picture | None:
    if not all(run["ess"]["per_token"] for run in runs):
        return None
    both = len(runs) == 2
    sides = ("base",) if both else ("base", "teacher")
    series = [run["ess"]["per_token"][side]["histogram"] for run in runs for side in sides]
    colours = RUNS if both else (SIDES["base"], SIDES["teacher"])

    def spec(width: int) -> Spec:
        across = x("from", "effective sample size of one token's weights", scale={"domain": [0, 1]})
        return view(
            histograms(series, across, "ESS", colours=colours, dashed=not both), width, HEIGHT
        )

    return Picture(
        "ess_token", "ess", "ESS per token" + (", base" if both else ""),
        "Each bar is the share of tokens whose importance weights towards a model have that effective sample size. At "
        "1 q* is that model; at 0.5 two draws of q* tell as much of the model as one draw of its own.",
        spec, key if both else SIDE_KEY,
    )  # fmt: skip


def coverage(runs: Sequence[Numbers], key: Any) -> Picture | None:
    if all(run["exactness"]["is_exact"] for run in runs):
        return None
    series = [run["exactness"]["coverage_by_position"] for run in runs]
    return Picture(
        "coverage", "exactness", "Coverage of the servers' lists along the text",
        "The line is the mass of the model of which less was seen, with its 95% interval. What is missing from 1 is "
        "what the certified bounds pay for; a wider top-k raises it.",
        lambda width: fans(series, "mass", "coverage", width, None), key,
    )  # fmt: skip


def bounds(runs: Sequence[Numbers], key: Any) -> Picture | None:
    if all(run["exactness"]["is_exact"] for run in runs):
        return None
    series = [run["exactness"]["tv_bound_histogram"] for run in runs]

    def spec(width: int) -> Spec:
        return view(
            histograms(series, x("from", "total variation", **powers(-8, 0)), "bound", power=True),
            width,
            HEIGHT,
        )

    return Picture(
        "bounds", "exactness", "Certified bounds per token",
        "Each bar is the share of tokens whose total variation to the exact q* is proved to be at most that. The "
        "leftmost bar holds the tokens that are exact.",
        spec, key,
    )  # fmt: skip
