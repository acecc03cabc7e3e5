"""The kernel that finds α and q of a row pair and draws, one program per decision; knows settings and tables.

It runs on the rows as they are, or on the candidates of a nucleus that the teacher scan copied; it is the same code for
both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.alpha import ROUNDING, Rule, first_guess, masses, newton

from midlogit.decide.kernels.layout import (  # isort: skip
    DRAFT_COLUMNS, DRAFT_LOG2_MASS, DRAFT_LOWEST, DRAFT_LSE, DRAFT_OUTCOME, DRAFT_PEAK, DRAFT_STOP,
    DRAFT_STOP_RAW, DRAFT_TEMPERED_LSE,
    ERROR_BROKEN, ERROR_EMPTY,
    KL_BUDGET,
    MIXTURE_COLUMNS,
    RESULT_ALPHA, RESULT_BASE_LOGPROB, RESULT_BASE_SUPPORT_LOGMASS, RESULT_BASE_SUPPORT_LOGPROB,
    RESULT_BASE_TEMPERED_LOGPROB, RESULT_COLUMNS, RESULT_DRAFT, RESULT_ENTROPY, RESULT_ERROR,
    RESULT_ESS_BASE, RESULT_ESS_TEACHER, RESULT_FALLBACK, RESULT_KL_BASE, RESULT_KL_TEACHER,
    RESULT_LOGPROB, RESULT_TEACHER_LOGPROB, RESULT_TEACHER_SUPPORT_LOGMASS,
    RESULT_TEACHER_SUPPORT_LOGPROB, RESULT_TEACHER_TEMPERED_LOGPROB, RESULT_TOKEN_ID,
    SCAN_CANDIDATES, SCAN_COLUMNS, SCAN_HIGH, SCAN_HIGH_MASS, SCAN_LOW, SCAN_LOW_MASS, SCAN_LOWEST,
    SCAN_LSE, SCAN_PEAK, SCAN_STOP, SCAN_STOP_BASE, SCAN_STOP_ID, SCAN_STOP_RAW, SCAN_STOP_TEACHER,
    SCAN_TARGET_MASS, SCAN_TEMPERED_LSE,
    SETTING_ACCEPT_UNIFORM, SETTING_ALPHABET, SETTING_BASE_ROW, SETTING_BASE_STOP, SETTING_COLUMNS,
    SETTING_FORCED, SETTING_GIVEN, SETTING_GREEDY, SETTING_INV_TEMPERATURE, SETTING_REDRAW_UNIFORM, SETTING_RULE,
    SETTING_RULE_PARAMETER, SETTING_TEACHER_ROW, SETTING_TOLERANCE, SETTING_TOP_P,
)  # fmt: skip
from midlogit.decide.kernels.moments import landmarks
from midlogit.decide.kernels.nucleus import find_nucleus, last_tie

from midlogit.decide.kernels.report import (  # isort: skip
    describe_given, find_draft, make_report, mixture_of, redraw, take_likeliest, weigh,
)  # fmt: skip
from midlogit.decide.kernels.tiles import FAR, LN2, LOWEST, RowPair
from midlogit.decide.kernels.top import store_mixture

SMALL_KL = tl.constexpr(0.02)  # below it the KLs are summed from terms that are never negative


@triton.jit
def load_rule(settings, inv_temperature):
    """The Rule of a decision."""
    code = tl.load(settings + SETTING_RULE).to(tl.int32)
    return Rule(
        code=code,
        parameter=tl.load(settings + SETTING_RULE_PARAMETER),
        budget=code == KL_BUDGET,
        tolerance=tl.load(settings + SETTING_TOLERANCE),
        rounding=ROUNDING * inv_temperature * inv_temperature,
    )


@triton.jit
def may_hold_holes(row, stop_at, drafts, scans):
    """Whether −inf is among the effective logits of ids that are not hidden."""
    lowest = tl.minimum(tl.load(drafts + DRAFT_LOWEST), tl.load(scans + SCAN_LOWEST))
    lowest = tl.minimum(
        lowest, tl.where(stop_at >= 0, tl.minimum(row.stop_base, row.stop_teacher), 0.0)
    )
    return lowest == float("-inf")


@triton.jit
def store_error(results, token, broken, draft):
    """Stores the result of a row from which nothing can be drawn."""
    tl.store(token, 0)
    for i in range(RESULT_COLUMNS):
        tl.store(results + i, 0.0)
    tl.store(results + RESULT_ERROR, tl.where(broken, ERROR_BROKEN, ERROR_EMPTY).to(tl.float64))
    tl.store(results + RESULT_DRAFT, draft.to(tl.float64))


@triton.jit
def constrain(
    # The pair, and whether there is a stop class.
    row,
    has_stop,
    # The support constraint, and where the scan found the nucleus to be.
    top_p,
    scans,
    # Both models' largest effective logits, log2(e) / temperature.
    b_peak,
    t_peak,
    scale,
    R: tl.constexpr,
    SHIFT: tl.constexpr,
    FULL: tl.constexpr,
):
    """(tau, tie) of the nucleus and the base's largest logit on it; of all that the teacher has at top_p = 1."""
    tau = row.tau
    tie = row.tie
    if top_p < 1.0:
        low = tl.load(scans + SCAN_LOW).to(tl.int32) >> SHIFT
        high = tl.load(scans + SCAN_HIGH).to(tl.int32) >> SHIFT
        low_mass = tl.load(scans + SCAN_LOW_MASS)
        high_mass = tl.load(scans + SCAN_HIGH_MASS)
        target = tl.load(scans + SCAN_TARGET_MASS)
        tau, tie, b_peak = find_nucleus(
            row, low, low_mass, high, high_mass, target, t_peak, scale, has_stop, R, SHIFT, FULL
        )
    elif top_p <= 1.0:
        tau = tl.full((), LOWEST, tl.float32)
        _, b_peak = last_tie(row, tau, 1, R, FULL)
        tie = tl.full((), FAR, tl.int32)
    return tau, tie, b_peak


@triton.jit
def draft_share(b_peak, scale, p_size, drafts):
    """D's mass on the support: there D is p times this, and nothing where the base drafts nothing."""
    d_peak = tl.load(drafts + DRAFT_PEAK)
    d_size = (
        tl.load(drafts + DRAFT_LOG2_MASS)
        + tl.where(d_peak > float("-inf"), d_peak - b_peak, 0.0) * scale
    )
    return tl.exp2(tl.minimum(p_size - d_size, 0.0)).to(tl.float32)


@triton.jit
def sample(
    row,
    ids,
    mix,
    report,
    share,
    greedy,
    # The draft, whether there is one, and where the uniforms are.
    draft,
    drafted,
    settings,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The token's column and its log2 q: the draft if it is accepted, else a draw from (q − D)₊."""
    column, b, t = find_draft(row, ids, draft, R, FULL, NUCLEUS)
    q_log, _, _, p_rel, _, _ = weigh(b, t, mix, True)
    draft_mass = share * tl.exp2(p_rel - mix.p_size)
    accept_uniform = tl.load(settings + SETTING_ACCEPT_UNIFORM)
    accepted = drafted & (accept_uniform * draft_mass * report.z < tl.exp2(q_log))
    if greedy:
        column, q_log = take_likeliest(row, mix, report.mass_B, R, FULL, NUCLEUS, BLOCK, BLOCKS)
    elif ~accepted:
        # Should rounding have left nothing of (q − D)₊, q itself is drawn from.
        some = tl.sum(report.rest_B) > 0
        mass_B = tl.where(some, report.rest_B, report.mass_B)
        share = tl.where(some, share, 0.0)
        uniform = tl.load(settings + SETTING_REDRAW_UNIFORM)
        column, q_log = redraw(
            row, ids, mix, mass_B, share, uniform, R, FULL, NUCLEUS, BLOCK, BLOCKS
        )
    return column, q_log


@triton.jit
def store_token(
    # The drawn column, and the id of the stop class, −1 without.
    column,
    stop_at,
    vocabulary,
    # Logits of both models, ids of the columns, what draft and scan found.
    base,
    teacher,
    ids,
    drafts,
    scans,
    # Results: the decision's row of the table, its id for the models to read next.
    results,
    token_out,
    FULL: tl.constexpr,
):
    """Stores the drawn token and both models' own logprobs of it; returns whether it is the stop class."""
    token = column
    if not FULL:
        token = tl.load(ids + column)
    stopped = token == stop_at
    raw_base = tl.load(base + column).to(tl.float64)
    raw_teacher = tl.load(teacher + column).to(tl.float64)
    raw_base = tl.where(stopped, tl.load(drafts + DRAFT_STOP_RAW), raw_base) - tl.load(
        drafts + DRAFT_LSE
    )
    raw_teacher = tl.where(stopped, tl.load(scans + SCAN_STOP_RAW), raw_teacher) - tl.load(
        scans + SCAN_LSE
    )
    token = tl.where(stopped, tl.load(scans + SCAN_STOP_ID).to(tl.int32), token)

    # The models read next an id that both have.
    tl.store(token_out, tl.where(stopped & (token >= vocabulary), stop_at, token).to(tl.int64))
    tl.store(results + RESULT_TOKEN_ID, token.to(tl.float64))
    tl.store(results + RESULT_BASE_LOGPROB, raw_base)
    tl.store(results + RESULT_TEACHER_LOGPROB, raw_teacher)
    return stopped


@triton.jit
def store_record(
    # The token's column, whether that is on the support and the stop class, the pair, both models' peaks, Masses and
    # whether the base has any.
    column,
    inside,
    stopped,
    row,
    b_peak,
    t_peak,
    mass,
    drafted,
    inv_temperature,
    # What draft and scan found; results.
    drafts,
    scans,
    results,
):
    """Stores what a trainer is told of the token (docs/theory.md (20a), (20c))."""
    at_stop = column == row.stop_at
    b = tl.where(at_stop, row.stop_base, tl.load(row.base + column).to(tl.float32))
    t = tl.where(at_stop, row.stop_teacher, tl.load(row.teacher + column).to(tl.float32))
    base = b.to(tl.float64) * inv_temperature
    teacher = t.to(tl.float64) * inv_temperature
    base_mass = b_peak.to(tl.float64) * inv_temperature + mass.log_p
    teacher_mass = t_peak.to(tl.float64) * inv_temperature + tl.log(mass.t)
    base_lse = tl.load(drafts + DRAFT_TEMPERED_LSE)
    teacher_lse = tl.load(scans + SCAN_TEMPERED_LSE)

    base_logprob = tl.where(inside, base - base_mass, float("-inf"))
    teacher_logprob = tl.where(inside, teacher - teacher_mass, float("-inf"))
    tl.store(results + RESULT_BASE_SUPPORT_LOGPROB, base_logprob)
    tl.store(results + RESULT_TEACHER_SUPPORT_LOGPROB, teacher_logprob)
    base_logmass = tl.where(drafted, base_mass - base_lse, float("-inf"))
    tl.store(results + RESULT_BASE_SUPPORT_LOGMASS, base_logmass)
    tl.store(results + RESULT_TEACHER_SUPPORT_LOGMASS, teacher_mass - teacher_lse)

    base = tl.where(stopped, tl.load(scans + SCAN_STOP_BASE), base)
    teacher = tl.where(stopped, tl.load(scans + SCAN_STOP_TEACHER), teacher)
    tl.store(results + RESULT_BASE_TEMPERED_LOGPROB, base - base_lse)
    tl.store(results + RESULT_TEACHER_TEMPERED_LOGPROB, teacher - teacher_lse)


@triton.jit
def stop_log_share(settings, inv_temperature, drafts, scans):
    """log of the base's share of the stop class that the emitted id has; 0 where the teacher's is emitted."""
    whole = tl.load(drafts + DRAFT_STOP) * inv_temperature
    own = tl.load(scans + SCAN_STOP_BASE)
    drawn = (tl.load(settings + SETTING_BASE_STOP) != 0) & (whole > float("-inf"))
    return tl.where(drawn, own - tl.where(drawn, whole, 0.0), 0.0)


@triton.jit
def store_report(results, report, q_log, log_share):
    """Stores what follows from the sums over the pair, and from the token's log2 q and its share of the outcome."""
    log_z = tl.log(report.z)
    kl_base = tl.where(
        report.missing > 0, float("inf"), report.kl_base / report.z + report.base_off
    )
    tl.store(results + RESULT_KL_BASE, kl_base)
    tl.store(results + RESULT_KL_TEACHER, report.kl_teacher / report.z + report.teacher_off)
    tl.store(results + RESULT_ENTROPY, log_z - report.entropy * LN2 / report.z)
    tl.store(results + RESULT_ESS_BASE, 1 / (report.z * report.ess_base))
    tl.store(results + RESULT_ESS_TEACHER, 1 / (report.z * report.ess_teacher))
    tl.store(results + RESULT_LOGPROB, q_log.to(tl.float64) * LN2 - log_z + log_share)


@triton.jit
def solve_kernel(
    # Logits of both models, or copied candidates with their ids.
    base, base_stride, teacher, teacher_stride, length, ids,
    # Ids that both models have.
    vocabulary,
    # Settings and alphabets.
    settings, hidden, hidden_stride, hidden_tiles, hidden_tiles_stride, stops,
    # The tables of drafts and scans.
    drafts, scans,
    # Results: the tables, and the ids for the models to read next.
    results, mixtures, tokens,
    # Sizes: lanes of a tile, ids of a stop class, low bits that a row's type lacks, ids of a block, blocks.
    R: tl.constexpr, STOPS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    # Whether rows may have a support constraint; whether these are whole rows.
    NUCLEUS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    # This decision's rows, unless the other launch has them.
    n = tl.program_id(0)
    settings += n * SETTING_COLUMNS
    scans += n * SCAN_COLUMNS
    results += n * RESULT_COLUMNS
    mixtures += n * MIXTURE_COLUMNS
    tokens += n
    base_row = tl.load(settings + SETTING_BASE_ROW).to(tl.int64)
    drafts += base_row * DRAFT_COLUMNS
    candidates = tl.load(scans + SCAN_CANDIDATES).to(tl.int32)
    if FULL:
        if candidates >= 0:
            return
        base += base_row * base_stride
        teacher += tl.load(settings + SETTING_TEACHER_ROW).to(tl.int64) * teacher_stride
    else:
        if candidates < 0:
            return
        base += n.to(tl.int64) * base_stride
        teacher += n.to(tl.int64) * teacher_stride
        ids += n.to(tl.int64) * base_stride
        length = candidates

    # What is asked, and what the kernels before have found.
    alphabet = tl.load(settings + SETTING_ALPHABET).to(tl.int32)
    inv_temperature = tl.load(settings + SETTING_INV_TEMPERATURE)
    scale = (inv_temperature / LN2).to(tl.float32)
    greedy = tl.load(settings + SETTING_GREEDY) != 0
    forced = tl.load(settings + SETTING_FORCED) != 0
    rule = load_rule(settings, inv_temperature)
    stop_at = tl.load(stops + alphabet * STOPS)
    draft = tl.load(drafts + DRAFT_OUTCOME).to(tl.int32)
    d_peak = tl.load(drafts + DRAFT_PEAK)
    b_peak = d_peak.to(tl.float32)
    t_peak = tl.load(scans + SCAN_PEAK).to(tl.float32)
    row = RowPair(
        base=base, teacher=teacher, length=length,
        hidden=hidden + alphabet * hidden_stride,
        hidden_tiles=hidden_tiles + alphabet * hidden_tiles_stride,
        stop_at=tl.where(FULL, stop_at, -1), stop_base=tl.load(drafts + DRAFT_STOP).to(tl.float32),
        stop_teacher=tl.load(scans + SCAN_STOP).to(tl.float32),
        tau=tl.full((), float("-inf"), tl.float32), tie=tl.full((), FAR, tl.int32),
    )  # fmt: skip
    general = forced | may_hold_holes(row, stop_at, drafts, scans)

    base_lse = tl.load(drafts + DRAFT_LSE)
    teacher_lse = tl.load(scans + SCAN_LSE)
    broken = ~((tl.abs(base_lse) < float("inf")) & (tl.abs(teacher_lse) < float("inf")))
    if broken | (t_peak == float("-inf")):
        store_error(results, tokens, broken, draft)
        return

    # The support.
    if NUCLEUS:
        top_p = tl.load(settings + SETTING_TOP_P)
        tau, tie, b_peak = constrain(
            row, stop_at >= 0, top_p, scans, b_peak, t_peak, scale, R, SHIFT, FULL
        )
        row = RowPair(
            base=base, teacher=teacher, length=length,
            hidden=row.hidden, hidden_tiles=row.hidden_tiles,
            stop_at=row.stop_at, stop_base=row.stop_base, stop_teacher=row.stop_teacher,
            tau=tau, tie=tie,
        )  # fmt: skip
    to_teacher = forced | (b_peak == float("-inf"))
    b_peak = tl.where(b_peak == float("-inf"), 0.0, b_peak)

    # α.
    if general:
        sums = landmarks(row, b_peak, t_peak, scale, R, FULL, NUCLEUS, True)
    else:
        sums = landmarks(row, b_peak, t_peak, scale, R, FULL, NUCLEUS, False)
    mass = masses(sums)
    guess = first_guess(sums, mass, rule)
    alpha, q_size, gradient, to_teacher = newton(
        row, b_peak, t_peak, scale, mass, general, rule, guess, to_teacher, R, FULL, NUCLEUS
    )

    # q and the token.
    p_size = mass.log_p / LN2
    q_size = tl.where(to_teacher, p_size, q_size)
    mix = mixture_of(b_peak, t_peak, scale, mass, alpha, p_size, q_size, to_teacher)
    share = draft_share(b_peak, scale, p_size, drafts)
    F = (q_size - p_size) * LN2
    close = (
        tl.minimum(alpha * gradient, (alpha - 1) * gradient) - F < SMALL_KL
    )  # the smaller KL: (6)
    report = make_report(row, mix, share, greedy, general, close, R, FULL, NUCLEUS, BLOCK, BLOCKS)
    store_mixture(mixtures, mix, row, report.z, ids, FULL)
    column, q_log = sample(
        row, ids, mix, report, share, greedy, draft, d_peak > float("-inf"), settings,
        R, FULL, NUCLEUS, BLOCK, BLOCKS,
    )  # fmt: skip

    inside = column >= 0  # a drawn one is
    if FULL:
        given = tl.load(settings + SETTING_GIVEN).to(tl.int32)
        if given >= 0:
            stop_id = tl.load(scans + SCAN_STOP_ID).to(tl.int32)
            column, q_log, inside = describe_given(row, given, stop_id, mix, R, NUCLEUS)

    stopped = store_token(
        column, stop_at, vocabulary, base, teacher, ids, drafts, scans, results, tokens, FULL
    )
    store_record(
        column, inside, stopped, row, b_peak, t_peak, mass, sums.p0 + sums.p_off > 0, inv_temperature,
        drafts, scans, results,
    )  # fmt: skip
    log_share = stop_log_share(settings, inv_temperature, drafts, scans)
    store_report(results, report, q_log, tl.where(stopped, log_share, 0.0))
    tl.store(results + RESULT_ALPHA, alpha)
    tl.store(results + RESULT_FALLBACK, (to_teacher & ~forced).to(tl.float64))
    tl.store(results + RESULT_ERROR, 0.0)
    tl.store(results + RESULT_DRAFT, draft.to(tl.float64))
