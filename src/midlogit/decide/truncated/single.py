"""One token from two short lists, in plain numbers: between two calls to a server the code of arrays grows cold.

Knows one pair of lists; draws what sampling/listed.py and sampling/policy.py draw for many, step by step as they do,
and leaves all that is to be known of the token to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, compress

from midlogit.core.bounds import MASS_PRECISION
from midlogit.core.mixture import FLOAT32, rounding
from midlogit.core.rules import AlphaRule
from midlogit.core.solver import MAX_STEPS, NARROWEST, NEWTON_STEPS
from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.rows import TopLogprobs

FLOAT64 = 2.0**-52  # its resolution
NARROW = 64  # ids of a list up to which plain numbers cost less than arrays
HIDDEN = -math.inf


def sample_single(pair: tuple[TopLogprobs, TopLogprobs], settings: RowSettings, vocabulary: int) -> int | None:
    """The token drawn; None where all are masked.

    Args:
        pair: lists of base and teacher. vocabulary: the ids drawn from are below it.
    """
    outcomes, stops = settings.outcomes, settings.outcomes.merged_stops
    hidden = outcomes.hidden if settings.may_end else outcomes.hidden_before_end
    union = pair[0].logprobs.keys() | pair[1].logprobs.keys()
    if not stops.isdisjoint(union):
        union |= stops
    ids = [i for i in sorted(union) if (i < vocabulary or i in stops) and i not in hidden]
    base, teacher = (_filled(row, ids, settings) for row in pair)
    p, t = (_tempered(values, ids, settings) for values in (base, teacher))

    support = range(len(ids)) if settings.top_p is None else _nucleus(pair[1], ids, t, settings, vocabulary)
    base_log, teacher_log = (_normalised([x[k] for k in support]) for x in (p, t))
    if max(teacher_log, default=HIDDEN) == HIDDEN:
        return None
    log_q = teacher_log
    common = [b > HIDDEN and a > HIDDEN for b, a in zip(base_log, teacher_log, strict=True)]
    if any(common) and not settings.forced:
        ratio = [a - b for b, a in compress(zip(base_log, teacher_log, strict=True), common)]
        log_base = list(compress(base_log, common))
        equal = rounding(FLOAT32, settings.temperature)
        alpha = solve(settings.rule, log_base, ratio, equal, settings.alpha_tol)
        mixed = iter(b + alpha * r for b, r in zip(log_base, ratio, strict=True))
        log_q = _normalised([next(mixed) if both else HIDDEN for both in common])

    drawn = ids[_drawn(log_q, support, p, ids, settings)]
    if drawn != outcomes.stop_outcome:
        return drawn
    return max((i for i in ids if i in stops), key=dict(zip(ids, teacher, strict=True)).__getitem__)


def _filled(row: TopLogprobs, ids: list[int], settings: RowSettings) -> list[float]:
    """Log-probabilities of ids, estimated where not listed (docs/theory.md (34))."""
    listed, stops, lead = row.logprobs, settings.outcomes.merged_stops, settings.outcomes.stop_outcome
    # Of a stop class that is partly listed the rest is left out; of one that is not, one member stands for it.
    absent = stops if not stops.isdisjoint(listed) else stops - {lead}
    missing = sum(i not in listed and i not in absent for i in ids)
    mass = _unlisted_mass(row)
    estimate = math.log(max(min(math.exp(row.max_unlisted), mass, mass / max(missing, 1)), 1e-300))
    return [listed.get(i, HIDDEN if i in absent else estimate) for i in ids]


def _unlisted_mass(row: TopLogprobs) -> float:
    if len(row.logprobs) >= row.size or not math.exp(row.max_unlisted):
        return 0.0
    return max(1.0 - sum(map(math.exp, row.logprobs.values())), 0.0) + MASS_PRECISION


def _tempered(values: list[float], ids: list[int], settings: RowSettings) -> list[float]:
    """Log weights at the temperature, those of the stop class summed at the id that stands for it."""
    inv_temperature = 1 / (settings.temperature or 1.0)
    log_weights = [value * inv_temperature for value in values]
    stops, lead = settings.outcomes.merged_stops, settings.outcomes.stop_outcome
    if not stops.isdisjoint(ids):
        total = _log_sum([x for x, i in zip(log_weights, ids, strict=True) if i in stops])
        log_weights = [
            x if i not in stops else total if i == lead else HIDDEN for x, i in zip(log_weights, ids, strict=True)
        ]
    return log_weights


def _nucleus(teacher: TopLogprobs, ids: list[int], t: list[float], settings: RowSettings, vocabulary: int) -> list[int]:
    """Places of the teacher's nucleus (docs/theory.md (15)), in id order."""
    inv_temperature = 1 / (settings.temperature or 1.0)
    known = [teacher.logprobs[i] for i in ids if i in teacher.logprobs]
    peak = max(known, default=0.0)
    hidden = settings.outcomes.hidden_count(settings.may_end, vocabulary) + teacher.size - vocabulary
    if settings.may_end:
        hidden -= sum(i < teacher.size for i in settings.outcomes.stops_beyond(vocabulary))
    hidden = max(hidden - (len(teacher.logprobs) - len(known)), 0)
    allowed = teacher.size - len(teacher.logprobs) - hidden
    mass = _unlisted_mass(teacher)
    cap, scale = min(math.exp(teacher.max_unlisted), mass), math.exp(-peak)
    total = sum(math.exp((lp - peak) * inv_temperature) for lp in known)
    if mass and allowed > 0:
        total += _unseen(mass * scale, cap * scale, allowed, hidden, inv_temperature)
    log_total = math.log(total) + peak * inv_temperature if total else 0.0
    order = sorted((k for k, x in enumerate(t) if x > HIDDEN), key=lambda k: -t[k])
    before = accumulate((math.exp(t[k] - log_total) for k in order), initial=0.0)
    top_p = settings.top_p or 1.0
    return sorted(k for k, mass_before in zip(order, before, strict=False) if mass_before < top_p or top_p == 1)


def _unseen(mass: float, cap: float, allowed: int, hidden: int, inv_temperature: float) -> float:
    """What unlisted ids weigh at the temperature if all are at the cap (docs/theory.md (22))."""
    if inv_temperature < 1:
        mass = max(mass - cap * hidden, 0.0)
    ends: tuple[float, float] = (
        mass * cap ** (inv_temperature - 1),
        allowed ** (1 - inv_temperature) * mass**inv_temperature,
    )
    return max(ends) if inv_temperature >= 1 else min(ends)


def _drawn(log_q: list[float], support: Sequence[int], p: list[float], ids: list[int], settings: RowSettings) -> int:
    """The place drawn: the base's draft where it stands, else one of the residual (docs/speculation.md section 1)."""
    if settings.temperature == 0:
        return support[log_q.index(max(log_q))]
    target = [0.0] * len(ids)
    for k, x in zip(support, log_q, strict=True):
        target[k] = math.exp(x)
    if settings.draft is None:
        peak = max(p)
        law = [math.exp(x - peak) for x in p] if peak > HIDDEN else [0.0] * len(p)
        total = sum(law) or 1.0
        law = [x / total for x in law]
        draft = _inverse_cdf(law, settings.uniforms.draft)
    else:
        outcome_of = settings.outcomes.outcome_of
        place = {i: k for k, i in enumerate(ids)}
        law = [0.0] * len(ids)
        for i, mass in settings.draft.law.items():
            if outcome_of(i) in place:
                law[place[outcome_of(i)]] += mass
        draft = place.get(outcome_of(settings.draft.token_id), -1)
    if draft >= 0 and law[draft] > 0 and settings.uniforms.accept * law[draft] < target[draft]:
        return draft
    rest = [max(r - d, 0.0) for r, d in zip(target, law, strict=True)]
    return _inverse_cdf(rest if sum(rest) > 0 else target, settings.uniforms.redraw)


def _inverse_cdf(masses: list[float], uniform: float) -> int:
    cumulative = list(accumulate(masses))
    wanted = uniform * cumulative[-1]
    drawn = sum(x <= wanted for x in cumulative)
    while drawn and (drawn == len(masses) or not masses[drawn]):  # rounding at the very end; nothing has mass
        drawn -= 1
    return drawn


def _normalised(log_weights: list[float]) -> list[float]:
    total = _log_sum(log_weights)
    return [x - total for x in log_weights] if total > HIDDEN else log_weights


def _log_sum(log_weights: list[float]) -> float:
    peak = max(log_weights, default=HIDDEN)
    return peak if peak == HIDDEN else peak + math.log(sum(math.exp(x - peak) for x in log_weights))


def solve(rule: AlphaRule, log_base: list[float], ratio: list[float], rounding: float, tolerance: float) -> float:
    """`core.solver.solve` for one row: the same steps on floats.

    Args:
        log_base: base log-probabilities on the common support. ratio: log teacher − log base there.
        rounding: |F′| that rounding alone can produce (`core.mixture.rounding`).
    """
    if rule.fixed_alpha is not None:
        return rule.fixed_alpha

    def residual(alpha: float) -> tuple[float, float]:
        return rule.residual(alpha, *moments(log_base, ratio, alpha))

    (low_value, _), (high_value, _) = residual(0.0), residual(1.0)
    if max(abs(low_value), abs(high_value)) <= max(rounding, 16 * FLOAT64):
        return 0.5
    if low_value >= 0 or high_value <= 0:
        return 0.0 if low_value >= 0 else 1.0

    low, high = 0.0, 1.0
    alpha = -low_value / (high_value - low_value)
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
