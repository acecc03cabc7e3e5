"""The numbers of one run, section by section, as JSON data: all that a page says; knows summaries, no HTML.

Quantiles come from histograms of 200 bins and are exact to a bin. Means have 95% intervals by clusters of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from midlogit.core.rules import EqualKL
from midlogit.jobs.measures import (
    ALPHA_STEPS,
    BINS,
    ENTROPY_MOST,
    ENTROPY_STEPS,
    LENGTHS_PER_OCTAVE,
    RANGES,
)
from midlogit.jobs.summary import Summary, add
from midlogit.params import SamplingParams
from midlogit.report.results import Results
from midlogit.report.statistics import kish_share, mean_of
from midlogit.report.texts import Text

QUANTILES = (5, 25, 50, 75, 95)
SHOWN_BINS = 100

Numbers = dict[str, Any]


def run_numbers(
    results: Results,
    texts: list[Text],
    places: list[dict[str, Any]],
    types: dict[str, Any] | None,
) -> Numbers:
    """All numbers of a run; sections without data are None.

    Args:
        types: tokens by type, of `--deep`; None without.
    """
    summary = results.summary
    has_tokens = summary.get("tokens") and summary["tokens"]["tokens"]
    tokens = summary["tokens"] if has_tokens else None
    rule = results.manifest.params.alpha_rule if results.manifest else None
    return {
        "head": head(results),
        "alpha": tokens and alpha(summary),
        "kl": tokens and kl(summary, results.manifest.params if results.manifest else None),
        "ess": ess(summary) if summary.get("weights") else None,
        "lengths": lengths(summary) if summary.get("metrics") else None,
        "texts": [text.to_dict() for text in texts],
        "disagreements": {"places": places, "types": types} if tokens else None,
        "exactness": tokens and exactness(summary),
        "errors": errors(summary),
        "rule": rule.spec if rule else None,
    }


def head(results: Results) -> Numbers:
    """What ran, and how much of it is done."""
    summary, manifest = results.summary, results.manifest
    tokens = summary.get("completion_tokens", 0)
    seconds = None
    if results.started is not None and results.ended is not None:
        seconds = results.ended - results.started
    closed = sum(not part.is_open for part in results.parts)
    return {
        "name": results.name,
        "completions": summary.get("completions", 0),
        "rows": summary.get("rows", 0),
        "planned": manifest.items if manifest else summary.get("completions", 0),
        "errors": summary.get("errors", 0),
        "prompt_tokens": summary.get("prompt_tokens", 0),
        "completion_tokens": tokens,
        "parts": manifest.parts if manifest else len(results.parts),
        "parts_done": closed,
        "parts_open": len(results.parts) - closed,
        "summaries_remade": results.remade,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds and closed == len(results.parts) else None,
        "engine_deaths": results.deaths,
        "workers": results.workers,
        "diagnostics": manifest.diagnostics if manifest else "full",
        "job": _job(results),
    }


def _job(results: Results) -> dict[str, Any] | None:
    manifest = results.manifest
    if manifest is None:
        return None
    parameters = manifest.parameters
    return {
        "fingerprint": manifest.fingerprint,
        "version": manifest.version,
        "created": manifest.created,
        "base": manifest.base,
        "teacher": manifest.teacher,
        "engine": parameters["engine"],
        "dtype": parameters.get("dtype"),
        "models": {side: dict(parameters[side]) for side in ("base", "teacher")},
        "sampling": dict(parameters["sampling"]),
        "chat": parameters["reading"]["chat"],
        "inputs": dict(parameters["inputs"]),
    }


def alpha(summary: Summary) -> Numbers:
    """α of unforced tokens: its mean, quantiles and histogram, over position and by entropy."""
    tokens = summary["tokens"]
    whole = _over_positions(summary, "alpha")
    return {
        "mean": mean_of(tokens["sums"]["alpha"]).to_dict(),
        "quantiles": quantiles(whole, "alpha"),
        "at_base": _share(tokens["at_base"], tokens["free"]),
        "at_teacher": _share(tokens["at_teacher"], tokens["free"]),
        "forced": _share(tokens["tokens"] - tokens["free"], tokens["tokens"]),
        "histogram": shares(whole, "alpha"),
        "by_position": by_position(summary, "alpha", "alpha"),
        "by_entropy": _by_entropy(tokens["histograms"]["alpha_by_entropy"], tokens["free"]),
    }


def kl(summary: Summary, params: SamplingParams | None) -> Numbers:
    """Both divergences of unforced tokens in nats, their difference, and the largest of each completion."""
    tokens, largest = summary["tokens"], summary["histograms"]["log10_max_kl"]
    sides = {}
    for side in ("base", "teacher"):
        name = f"log10_kl_{side}"
        whole = _over_positions(summary, name)
        sides[side] = {
            "mean": mean_of(tokens["sums"][f"kl_{side}"]).to_dict(),
            "quantiles": {q: _power(x) for q, x in quantiles(whole, name).items()},
            "histogram": shares(whole, name),
            "by_position": [
                {**row, "quantiles": {q: _power(x) for q, x in row["quantiles"].items()}}
                for row in by_position(summary, name, f"kl_{side}")
            ],
        }
    return {
        **sides,
        "largest": {
            "mean": mean_of(summary["metrics"]["max_kl"]).to_dict(),
            "histogram": shares(largest, "log10_max_kl"),
        },
        "no_common_token": tokens["no_common_token"],
        "self_test": _self_test(summary, params),
    }


def _self_test(summary: Summary, params: SamplingParams | None) -> Numbers:
    """|KL base − KL teacher| where α lies between the ends: within the solver's tolerance under equal KL."""
    tokens = summary["tokens"]
    counts = tokens["histograms"]["log10_difference"]
    tolerance = params.alpha_tol if params else SamplingParams().alpha_tol
    low, high = RANGES["log10_difference"]
    first = math.ceil((math.log10(tolerance) - low) / (high - low) * BINS - 1e-9)
    above = sum(count for number, count in counts.items() if int(number) >= first)
    return {
        "applies": params is None or isinstance(params.alpha_rule, EqualKL),
        "tolerance": tolerance,
        "tested": tokens["tested"],
        "above": _share(above, tokens["tested"]),
        "quantiles": {q: _power(x) for q, x in quantiles(counts, "log10_difference").items()},
        "histogram": shares(counts, "log10_difference"),
    }


def ess(summary: Summary) -> Numbers:
    """Effective sample sizes: per token, and of the weights of whole sequences by their length."""
    tokens, weights = summary.get("tokens") or None, summary["weights"]
    per_token = tokens and {
        side: {
            "mean": mean_of(tokens["sums"][f"ess_{side}"]).to_dict(),
            "histogram": shares(tokens["histograms"][f"ess_{side}"], f"ess_{side}"),
        }
        for side in ("base", "teacher")
    }
    total: Summary = {}
    for entry in weights.values():
        add(total, entry)
    return {
        "per_token": per_token,
        "sequences": _kish(total),
        "by_length": [
            {"from": _shortest(int(number)), "to": _shortest(int(number) + 1) - 1, **_kish(entry)}
            for number, entry in sorted(weights.items(), key=lambda item: int(item[0]))
        ],
        "log_weights": {
            side: mean_of(summary["metrics"][f"{side}_log_weight"]).to_dict()
            for side in ("base", "teacher")
        },
    }


def _kish(entry: Mapping[str, Any]) -> Numbers:
    count = entry["count"]
    return {"count": count} | {
        side: kish_share(entry[side]["log_sum"], entry[side]["log_squares"], count)
        for side in ("base", "teacher")
    }


def lengths(summary: Summary) -> Numbers:
    """Lengths in tokens, how completions end, how much they repeat."""
    metrics, counts = summary["metrics"], summary["histograms"]["lengths"]
    identical = summary["identical"]
    return {
        "mean": mean_of(metrics["completion_tokens"]).to_dict(),
        "histogram": [
            {"from": _shortest(int(number)), "to": _shortest(int(number) + 1) - 1, "count": count}
            for number, count in sorted(counts.items(), key=lambda item: int(item[0]))
        ],
        "finish_reasons": {
            reason: {"count": count, "share": _share(count, summary["completions"])}
            for reason, count in sorted(summary["finish_reasons"].items())
        },
        "stopped": mean_of(metrics["stopped"]).to_dict(),
        "repetition": mean_of(metrics["repetition"]).to_dict(),
        "repetition_histogram": shares(summary["histograms"]["repetition"], "repetition"),
        "identical": {
            **identical,
            "share": _share(identical["repeated"], identical["completions"]),
        },
    }


def exactness(summary: Summary) -> Numbers:
    """How far the sampled law may be from the exact q*: coverage of lists, and certified bounds."""
    tokens = summary["tokens"]
    count = tokens["tokens"]
    return {
        "is_exact": tokens["max_tv_bound"] == 0,
        "coverage": mean_of(tokens["sums"]["coverage"]).to_dict(),
        "coverage_histogram": shares(tokens["histograms"]["coverage"], "coverage"),
        "coverage_by_position": [
            _position(int(number), entry) | mean_of(entry["sums"]["coverage"]).to_dict()
            for number, entry in _positions(summary)
        ],
        "tv_bound": mean_of(tokens["sums"]["tv_bound"]).to_dict(),
        "tv_bound_histogram": shares(tokens["histograms"]["log10_tv_bound"], "log10_tv_bound"),
        "above_0.01": _share(tokens["bound_above_0.01"], count),
        "above_0.05": _share(tokens["bound_above_0.05"], count),
        "largest_tv_bound": tokens["max_tv_bound"],
        "alpha_bound": mean_of(tokens["sums"]["alpha_bound"]).to_dict(),
        "largest_alpha_bound": tokens["max_alpha_bound"],
        "whole_texts": mean_of(summary["metrics"]["sum_tv_bound"]).to_dict(),
        "base_bounded": _share(tokens["base_bounded"], count),
        "teacher_bounded": _share(tokens["teacher_bounded"], count),
    }


def errors(summary: Summary) -> Numbers:
    """Completions that ended as errors, by kind."""
    kinds = summary.get("error_kinds", {})
    return {
        "count": summary.get("errors", 0),
        "share": _share(summary.get("errors", 0), summary.get("completions", 0)),
        "kinds": [
            {"kind": kind, **entry}
            for kind, entry in sorted(kinds.items(), key=lambda item: (-item[1]["count"], item[0]))
        ],
    }


def by_position(summary: Summary, name: str, sums: str) -> list[Numbers]:
    """Mean, interval and quantiles over bins of positions.

    Args:
        name: of the histogram. sums: of the values.
    """
    return [
        {
            **_position(int(number), entry),
            **mean_of(entry["sums"][sums]).to_dict(),
            "quantiles": quantiles(entry["histograms"][name], name),
        }
        for number, entry in _positions(summary)
        if entry["sums"][sums]["count"]
    ]


def first_position(number: int) -> int:
    """The first position of a bin of `midlogit.jobs.measures.position_bins`, from 0."""
    return math.ceil(2 ** (number / 2) - 1e-9) - 1


def shares(counts: Mapping[str, int], name: str) -> list[Numbers]:
    """A histogram in `SHOWN_BINS` bins: the lower edge of each, and its share."""
    low, high = RANGES[name]
    merged = [0] * SHOWN_BINS
    for number, count in counts.items():
        merged[int(number) * SHOWN_BINS // BINS] += count
    total = sum(merged)
    width = (high - low) / SHOWN_BINS
    return [
        {
            "from": low + width * number,
            "to": low + width * (number + 1),
            "share": _share(count, total),
        }
        for number, count in enumerate(merged)
    ]


def quantiles(counts: Mapping[str, int], name: str) -> dict[str, float | None]:
    """Quantiles of a histogram, as if the values of a bin were spread evenly over it."""
    low, high = RANGES[name]
    total = sum(counts.values())
    ordered = sorted((int(number), count) for number, count in counts.items())
    found: dict[str, float | None] = {}
    for percent in QUANTILES:
        passed, found[str(percent)] = 0, None
        for number, count in ordered:
            wanted = percent / 100 * total
            if passed + count >= wanted:
                within = number + (wanted - passed) / count
                found[str(percent)] = low + within * (high - low) / BINS
                break
            passed += count
    return found


def _positions(summary: Summary) -> list[tuple[str, Any]]:
    return sorted(summary["positions"].items(), key=lambda item: int(item[0]))


def _position(number: int, entry: Mapping[str, Any]) -> Numbers:
    return {
        "first": first_position(number),
        "last": first_position(number + 1) - 1,
        "tokens": entry["tokens"],
        "forced": entry["forced"],
    }


def _over_positions(summary: Summary, name: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for entry in summary["positions"].values():
        for number, count in entry["histograms"][name].items():
            total[number] = total.get(number, 0) + count
    return total


def _by_entropy(counts: Mapping[str, int], total: int) -> list[Numbers]:
    """Cells of α by entropy that hold a token: lower edges and shares; the last entropy is all above."""
    return [
        {
            "alpha": int(number) % ALPHA_STEPS / ALPHA_STEPS,
            "entropy": int(number) // ALPHA_STEPS * ENTROPY_MOST / ENTROPY_STEPS,
            "share": _share(count, total),
        }
        for number, count in sorted(counts.items(), key=lambda item: int(item[0]))
    ]


def _shortest(number: int) -> int:
    """The shortest length of a bin of lengths."""
    return math.ceil(2 ** (number / LENGTHS_PER_OCTAVE) - 1e-9)


def _power(logarithm: float | None) -> float | None:
    return None if logarithm is None else 10.0**logarithm


def _share(count: float, total: float) -> float | None:
    return count / total if total else None
