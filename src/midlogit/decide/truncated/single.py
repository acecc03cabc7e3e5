"""One token from two short lists, on plain floats: a scalar fast path, because call overhead dominates short arrays.

Samples what `rows.py` and `decide/sampling.py` sample, step by step as they do, and leaves all diagnostics to them;
nothing else depends on how it works.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, compress

from midlogit.core.mixture import FLOAT32, rounding
from midlogit.core.noise import FIRST_BLOCK, IDS_PER_BLOCK, exponential
from midlogit.core.rules import AlphaRule
from midlogit.core.solver import MAX_STEPS, NARROWEST, NEWTON_STEPS
from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.lists import TopLogprobs, drawable_ids, num_masked, stops_beyond

FLOAT64 = 2.0**-52  # its resolution
MAX_SCALAR_IDS = 64  # ids of a list up to which floats cost less than arrays
NO_MASS = -math.inf


def sample_single(
    pair: tuple[TopLogprobs, TopLogprobs], settings: RowSettings, vocabulary: int
) -> int | None:
    """Draws one token; None where every id is masked.

    Args:
        pair: lists of base and teacher. vocabulary: ids below it are drawn from.
    """
    outcomes, stops = settings.outcomes, settings.outcomes.merged_stops
    union = pair[0].logprobs.keys() | pair[1].logprobs.keys()
    if not stops.isdisjoint(union):
        union |= stops
    ids = sorted(drawable_ids(union, settings, vocabulary))
    base, teacher = (_filled(row, ids, settings) for row in pair)
    p, t = (_log_weights(values, ids, settings) for values in (base, teacher))

    support = (
        range(len(ids))
        if settings.top_p is None
        else _nucleus(pair[1], ids, t, settings, vocabulary)
    )
    base_log, teacher_log = (_normalised([x[k] for k in support]) for x in (p, t))
    if max(teacher_log, default=NO_MASS) == NO_MASS:
        return None

    log_q = _log_mixture(base_log, teacher_log, settings)
    drawn = ids[_draw(log_q, support, p, ids, settings)]
    if drawn != outcomes.stop_outcome:
        return drawn
    if outcomes.draws_stop_id:
        return _base_stop(dict(zip(ids, base, strict=True)), settings)
    return max((i for i in ids if i in stops), key=dict(zip(ids, teacher, strict=True)).__getitem__)


def _base_stop(base: dict[int, float], settings: RowSettings) -> int:
    """The member of the stop class that the base's own conditional draws (docs/theory.md (20b))."""
    stop_ids, inv_temperature = settings.outcomes.stop_ids, 1 / (settings.temperature or 1.0)
    log_weights = [base.get(i, NO_MASS) * inv_temperature for i in stop_ids]
    peak = max(log_weights)
    if settings.temperature == 0 or peak == NO_MASS:
        return stop_ids[log_weights.index(peak)]
    masses = [math.exp(x - peak) for x in log_weights]
    return _gumbel_max(masses, stop_ids, stop_ids, settings.uniforms.ending)


def _filled(row: TopLogprobs, ids: list[int], settings: RowSettings) -> list[float]:
    """Log-probabilities of ids, estimated where not listed (docs/theory.md (34))."""
    listed, stops, lead = (
        row.logprobs,
        settings.outcomes.merged_stops,
        settings.outcomes.stop_outcome,
    )
    # A stop class that is partly listed gets no estimate for the rest; one that is not gets one for all.
    absent = stops if not stops.isdisjoint(listed) else stops - {lead}
    missing = sum(i not in listed and i not in absent for i in ids)
    mass = row.unlisted_mass()
    estimate = math.log(max(min(math.exp(row.max_unlisted), mass, mass / max(missing, 1)), 1e-300))
    return [listed.get(i, NO_MASS if i in absent else estimate) for i in ids]


def _log_weights(values: list[float], ids: list[int], settings: RowSettings) -> list[float]:
    """Log weights at the temperature, those of the stop class summed at its first id."""
    inv_temperature = 1 / (settings.temperature or 1.0)
    log_weights = [value * inv_temperature for value in values]
    stops, lead = settings.outcomes.merged_stops, settings.outcomes.stop_outcome
    if stops.isdisjoint(ids):
        return log_weights

    total = _log_sum([x for x, i in zip(log_weights, ids, strict=True) if i in stops])
    return [
        x if i not in stops else total if i == lead else NO_MASS
        for x, i in zip(log_weights, ids, strict=True)
    ]


def _nucleus(
    teacher: TopLogprobs, ids: list[int], t: list[float], settings: RowSettings, vocabulary: int
) -> list[int]:
    """Places of the teacher's nucleus (docs/theory.md (15)), in id order."""
    inv_temperature = 1 / (settings.temperature or 1.0)
    known = [teacher.logprobs[i] for i in ids if i in teacher.logprobs]
    peak = max(known, default=0.0)
    total = sum(math.exp((logprob - peak) * inv_temperature) for logprob in known)

    masked = num_masked(settings.outcomes, settings.may_end, vocabulary) + teacher.size - vocabulary
    if settings.may_end:
        masked -= sum(i < teacher.size for i in stops_beyond(settings.outcomes, vocabulary))
    masked = max(masked - (len(teacher.logprobs) - len(known)), 0)
    allowed = teacher.size - len(teacher.logprobs) - masked
    mass = teacher.unlisted_mass()
    if mass and allowed > 0:
        cap, scale = min(math.exp(teacher.max_unlisted), mass), math.exp(-peak)
        total += _unlisted_weight(mass * scale, cap * scale, allowed, masked, inv_temperature)
    log_total = math.log(total) + peak * inv_temperature if total else 0.0

    order = sorted((k for k, x in enumerate(t) if x > NO_MASS), key=lambda k: -t[k])
    before = accumulate((math.exp(t[k] - log_total) for k in order), initial=0.0)
    top_p = settings.top_p or 1.0
    return sorted(
        k
        for k, mass_before in zip(order, before, strict=False)
        if mass_before < top_p or top_p == 1
    )


def _unlisted_weight(
    mass: float, cap: float, allowed: int, masked: int, inv_temperature: float
) -> float:
    """The weight of unlisted ids at the temperature if all are at the cap (docs/theory.md (22))."""
    if inv_temperature < 1:
        mass = max(mass - cap * masked, 0.0)
    at_cap: float = mass * cap ** (inv_temperature - 1)
    spread: float = allowed ** (1 - inv_temperature) * mass**inv_temperature
    return max(at_cap, spread) if inv_temperature >= 1 else min(at_cap, spread)


def _log_mixture(
    base_log: list[float], teacher_log: list[float], settings: RowSettings
) -> list[float]:
    """log q on the support: the teacher's if forced or without a common support."""
    common = [b > NO_MASS and t > NO_MASS for b, t in zip(base_log, teacher_log, strict=True)]
    if settings.forced or not any(common):
        return teacher_log

    log_base = list(compress(base_log, common))
    ratio = [t - b for b, t in compress(zip(base_log, teacher_log, strict=True), common)]
    equal = rounding(FLOAT32, settings.temperature)
    alpha = solve(settings.rule, log_base, ratio, equal, settings.alpha_tol)
    mixed = iter(b + alpha * r for b, r in zip(log_base, ratio, strict=True))
    return _normalised([next(mixed) if both else NO_MASS for both in common])


def solve(
    rule: AlphaRule,
    log_base: list[float],
    ratio: list[float],
    rounding_error: float,
    tolerance: float,
) -> float:
    """`core.solver.solve` for one row: the same steps on floats.

    Args:
        log_base: base log-probabilities on the common support. ratio: log teacher − log base there.
        rounding_error: |F′| that rounding alone can produce (`core.mixture.rounding`).
    """
    if rule.fixed_alpha is not None:
        return rule.fixed_alpha

    def residual(alpha: float) -> tuple[float, float]:
        return rule.residual(alpha, *moments(log_base, ratio, alpha))

    (low_value, _), (high_value, _) = residual(0.0), residual(1.0)
    if max(abs(low_value), abs(high_value)) <= max(rounding_error, 16 * FLOAT64):
        return 0.5
    if low_value >= 0 or high_value <= 0:
        return 0.0 if low_value >= 0 else 1.0

    low, high = 0.0, 1.0
    alpha: float = -low_value / (high_value - low_value)
    for step in range(MAX_STEPS):
        value, slope = residual(alpha)
        low, high = (alpha, high) if value < 0 else (low, alpha)
        if abs(value) <= max(tolerance * min(slope, 1.0), FLOAT64) or high - low <= NARROWEST:
            break
        newton = alpha - value / slope if slope > 0 and step < NEWTON_STEPS else low
        alpha = newton if low < newton < high else 0.5 * (low + high)
    return alpha


def moments(log_base: list[float], ratio: list[float], alpha: float) -> tuple[float, float, float]:
    """F(α), F′(α) and F″(α) of one row (docs/theory.md (2), (4), (5))."""
    exponent = [b + alpha * r for b, r in zip(log_base, ratio, strict=True)]
    peak = max(exponent)
    mass = [math.exp(e - peak) for e in exponent]
    total = sum(mass)
    mass = [m * r for m, r in zip(mass, ratio, strict=True)]
    mean = sum(mass) / total
    square = sum(m * r for m, r in zip(mass, ratio, strict=True)) / total
    return math.log(total) + peak, mean, max(square - mean**2, 0.0)


def _draw(
    log_q: list[float],
    support: Sequence[int],
    p: list[float],
    ids: list[int],
    settings: RowSettings,
) -> int:
    """The place drawn: the base's draft if accepted, else one of the residual (docs/speculation.md section 1)."""
    if settings.temperature == 0:
        return support[log_q.index(max(log_q))]
    target = [0.0] * len(ids)
    for k, x in zip(support, log_q, strict=True):
        target[k] = math.exp(x)

    draft, probs = _draft(p, ids, settings)
    if draft >= 0 and probs[draft] > 0 and settings.uniforms.accept * probs[draft] < target[draft]:
        return draft
    rest = [max(r - d, 0.0) for r, d in zip(target, probs, strict=True)]
    return _draw_place(rest if sum(rest) > 0 else target, ids, settings.uniforms.redraw)


def _draft(p: list[float], ids: list[int], settings: RowSettings) -> tuple[int, list[float]]:
    """The place of the base's draft, −1 for none, and the distribution it was drawn from."""
    if settings.draft is None:
        peak = max(p)
        probs = [math.exp(x - peak) for x in p] if peak > NO_MASS else [0.0] * len(p)
        total = sum(probs) or 1.0
        probs = [x / total for x in probs]
        return _draw_place(probs, ids, settings.uniforms.draft), probs

    outcome_of = settings.outcomes.outcome_of
    place = {i: k for k, i in enumerate(ids)}
    probs = [0.0] * len(ids)
    for i, mass in settings.draft.probs.items():
        if outcome_of(i) in place:
            probs[place[outcome_of(i)]] += mass
    return place.get(outcome_of(settings.draft.token_id), -1), probs


def _draw_place(masses: list[float], ids: list[int], uniform: float) -> int:
    """The place that `core.draw.draw_columns` draws."""
    blocks: dict[int, float] = {}
    of_place = [FIRST_BLOCK + i // IDS_PER_BLOCK for i in ids]
    for block, mass in zip(of_place, masses, strict=True):
        blocks[block] = blocks.get(block, 0.0) + mass
    drawn = _gumbel_max(blocks.values(), blocks, blocks, uniform)
    inside = [place for place, block in enumerate(of_place) if block == drawn]
    return _gumbel_max([masses[k] for k in inside], [ids[k] for k in inside], inside, uniform)


def _gumbel_max(
    masses: Iterable[float], numbers: Iterable[int], outcomes: Iterable[int], uniform: float
) -> int:
    """The outcome whose log mass plus Gumbel noise is the largest.

    Args:
        numbers: of the outcomes, as `core.noise` counts them.
    """
    arrivals = {
        outcome: exponential(uniform, number) / mass if mass else math.inf
        for outcome, number, mass in zip(outcomes, numbers, masses, strict=True)
    }
    return min(arrivals, key=arrivals.__getitem__)


def _normalised(log_weights: list[float]) -> list[float]:
    total = _log_sum(log_weights)
    return [x - total for x in log_weights] if total > NO_MASS else log_weights


def _log_sum(log_weights: list[float]) -> float:
    peak = max(log_weights, default=NO_MASS)
    return (
        peak if peak == NO_MASS else peak + math.log(sum(math.exp(x - peak) for x in log_weights))
    )
