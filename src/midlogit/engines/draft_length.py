"""Chooses the draft length γ of each round: fixed, or tuned from measured round times and acceptance.

Knows times and counts, no rows. A round drafts γ tokens with the base and has the teacher verify all of them in one
forward; γ = 0 is lock-step. A round with guesses has MAX_DRAFTS drafts in two forwards of the base. The choice changes
the speed, never the tokens. Engines differ in what they do with the bonus row, the teacher's row after the last draft
(docs/speculation.md).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from midlogit.errors import InvalidRequest

MAX_DRAFTS = 16
FIRST_TRY = 4  # γ of the first rounds that speculate
UNTIMED = (
    3  # first rounds of each batch size that are not timed: they follow prompts, and compilers run
)
TIMED = 7  # times of a batch size and γ that are needed before they are believed
KEPT = 15  # times that are kept
LOOK = (
    3  # rounds in a row that a γ gets so that its time is known; the first of them does not count
)
SOON = 3  # rounds between two looks as long as the times of a neighbour of the best γ are missing
PAUSE = 8  # rounds between two looks afterwards, at least
REGRET = 0.01  # share of the tokens that looks may then cost
OUTLIER = 2.5  # times the median: a round that had to wait
DECAY = 0.999  # of acceptance counts, per round
PRIOR = 4.0, 5.0  # accepted of verified drafts, before any were counted

SpeculationOption = int | Literal["auto", "off"]


def require_speculation(option: SpeculationOption) -> None:
    """Checks the option that a user gave.

    Raises:
        InvalidRequest: neither "auto", "off" nor 0 to MAX_DRAFTS.
    """
    whole = isinstance(option, int) and not isinstance(option, bool)
    if not (option in ("auto", "off") or (whole and 0 <= int(option) <= MAX_DRAFTS)):
        raise InvalidRequest(
            f"speculation is {option!r}.", f"Use auto, off, or 0 to {MAX_DRAFTS} drafts per round."
        )


@dataclass(slots=True)
class Acceptance:
    """Acceptance counts by the position of a draft in its round.

    Attributes:
        verified, accepted: drafts at each position since the start.
        recent: decaying weights (accepted, verified) at each position, for choosing γ.
        guessed_rounds, guesses_stood: rounds of single sequences with guesses, and guesses that were the base's drafts.
    """

    verified: list[int]
    accepted: list[int]
    recent: list[tuple[float, float]]
    guessed_rounds: int = 0
    guesses_stood: int = 0

    @classmethod
    def empty(cls) -> Acceptance:
        return cls([0] * MAX_DRAFTS, [0] * MAX_DRAFTS, [(0.0, 0.0)] * MAX_DRAFTS)

    def add(
        self,
        accepted_N: Sequence[int],
        verified_N: Sequence[int],
        stood_N: Sequence[int] = (),
    ) -> None:
        """Counts a round of N sequences: the accepted and the verified drafts of each, and guesses that stood."""
        for position in range(max(verified_N, default=0)):
            verified = sum(n > position for n in verified_N)
            accepted = sum(n > position for n in accepted_N)
            self.verified[position] += verified
            self.accepted[position] += accepted

            if not stood_N:  # drafts after guesses that stood say nothing about others
                recent_accepted, recent_verified = self.recent[position]
                self.recent[position] = (
                    DECAY * recent_accepted + accepted,
                    DECAY * recent_verified + verified,
                )
        self.guessed_rounds += len(stood_N)
        self.guesses_stood += sum(stood_N)

    def tokens(self, drafts: int, reuses_bonus_row: bool) -> float:
        """Expected tokens per round.

        Args:
            reuses_bonus_row: whether the bonus row decides the first token of the next round; otherwise it gives a
                token in the same round, if all drafts were accepted.
        """
        weight = PRIOR[1]
        accepted = PRIOR[0] + sum(n for n, _ in self.recent)
        verified = PRIOR[1] + sum(n for _, n in self.recent)

        # The probability that at least so many drafts are accepted; positions with few samples are shrunk toward the
        # pooled rate.
        reached = [1.0]
        for accepted_here, verified_here in self.recent[:drafts]:
            reached.append(
                reached[-1]
                * (accepted_here + weight * accepted / verified)
                / (verified_here + weight)
            )
        if not reuses_bonus_row or not drafts:
            return sum(reached)

        # A round after one whose drafts were all accepted has one draft fewer: its first token is known.
        plain, with_bonus = sum(reached[:-1]), 1 + sum(reached[:-2])
        share = reached[-1] / (1 - reached[-2] + reached[-1])
        return plain + share * (with_bonus - plain)

    def tokens_with_guesses(self, rates_N: Sequence[float]) -> float:
        """Expected tokens of a round of N sequences with guesses.

        Args:
            rates_N: for each, the probability that a token is the guess there, if the guesses before it were right;
                0 without guesses.
        """
        first = self.tokens(1, reuses_bonus_row=False) - 1
        # Two drafts need no guess; the third stands on the guesses at the first and the second.
        return sum(1 + first * (1 + sum(rate**n for n in range(2, MAX_DRAFTS))) for rate in rates_N)


class DraftLength:
    """Chooses γ for each round and counts accepted drafts.

    Args:
        option: "auto", "off", or a fixed number of drafts.
        choices: the γ that the engine can run, in order, 0 among them; "auto" chooses among these.
        reuses_bonus_row: as in `Acceptance.tokens`.

    Raises:
        InvalidRequest: an option that is none of these.
    """

    def __init__(
        self,
        option: SpeculationOption,
        choices: Sequence[int] = range(9),
        *,
        reuses_bonus_row: bool = False,
    ) -> None:
        require_speculation(option)
        self._reuses_bonus_row = reuses_bonus_row
        self._auto = option == "auto"
        self._fixed = 0 if isinstance(option, str) else option
        self._choices = list(choices)
        self._acceptance = Acceptance.empty()
        self._rounds = 0

        # By batch size and γ: seconds per round, and the number of the last time.
        self._seconds: defaultdict[tuple[int, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=KEPT)
        )
        self._last_timed: defaultdict[tuple[int, int], int] = defaultdict(int)

        # By batch size: times taken, the best γ, γ of the next rounds, rounds since the last look, the γ last chosen.
        self._times: Counter[int] = Counter()
        self._best: dict[int, int] = {}
        self._planned: defaultdict[int, list[int]] = defaultdict(list)
        self._since_look: Counter[int] = Counter()
        self._last: dict[int, int] = {}

        self._previous: int | None = None  # γ of the last timed round

    @property
    def choices(self) -> list[int]:
        """The γ above 0 that a round may have, in order."""
        return [g for g in (self._choices if self._auto else (self._fixed,)) if g]

    @property
    def fixed(self) -> bool:
        """Whether γ was given, not left to be chosen."""
        return not self._auto

    def next(self, batch: int) -> int:
        """γ for the next round of `batch` sequences."""
        if not self._auto:
            return self._fixed
        size = batch.bit_length()
        if not self._planned[size]:
            self._planned[size] = self._plan(size)
        self._last[size] = self._planned[size].pop()
        return self._last[size]

    def guesses_pay(self, rates_N: Sequence[float]) -> bool:
        """Whether a round of N sequences with guesses gives more tokens a second than one with the γ in use.

        Its time is taken to be that of the other until it was measured.

        Args:
            rates_N: as in `Acceptance.tokens_with_guesses`.
        """
        size = len(rates_N).bit_length()
        gamma = self._in_use(size)
        if gamma in (None, MAX_DRAFTS) or not self.choices or not any(rates_N):
            return False
        usual, guessed = self._seconds[size, gamma], self._seconds[size, MAX_DRAFTS]
        if len(usual) < TIMED:
            return False

        slower = _mean(guessed) / _mean(usual) if len(guessed) >= TIMED else 1.0
        tokens = len(rates_N) * self._acceptance.tokens(gamma, self._reuses_bonus_row)
        return self._acceptance.tokens_with_guesses(rates_N) > slower * tokens

    def _in_use(self, size: int) -> int | None:
        """The γ that was given, or that is the best as far as is known."""
        return self._best.get(size) if self._auto else self._fixed

    def _plan(self, size: int) -> list[int]:
        """γ for the next rounds."""
        seconds = {g: self._seconds[size, g] for g in self._choices}
        known = {g: _mean(times) for g, times in seconds.items() if len(times) >= TIMED}

        first = min(self._choices, key=lambda g: abs(g - FIRST_TRY))
        missing = [g for g in (first, 0) if g not in known]
        if missing:  # in turns, since the machine may become slower or faster
            return [min(missing, key=lambda g: self._last_timed[size, g])] * LOOK

        tokens = {g: self._acceptance.tokens(g, self._reuses_bonus_row) for g in self._choices}
        speeds = {g: tokens[g] / _round_seconds(g, known) for g in self._choices}
        best = self._best[size] = max(speeds, key=speeds.__getitem__)

        position = self._choices.index(best)
        around = {0, *self._choices[max(position - 1, 0) : position + 2]} - {best}
        if best not in known or not around:
            return [best]

        other = min(around, key=lambda g: (g in known, self._last_timed[size, g]))
        pause: float = SOON
        if other in known:
            lost = 1 - speeds[other] / speeds[best]  # share of the tokens
            pause = max(PAUSE, lost * LOOK * known[other] / known[best] / REGRET)
        self._since_look[size] += 1
        if self._since_look[size] < pause:
            return [best]

        self._since_look[size] = 0
        return [other] * LOOK

    def record_acceptance(
        self,
        drafts: int,
        accepted_N: Sequence[int],
        verified_N: Sequence[int] | None = None,
        stood_N: Sequence[int] = (),
    ) -> None:
        """Counts a round of N sequences.

        Args:
            drafts: its γ. accepted_N: accepted drafts of each sequence.
            verified_N: verified drafts of each; by default one more than accepted, or all. Drafts after the end of a
                sequence are not verified.
            stood_N: guesses of each that stood; empty in a round without guesses.
        """
        if drafts:
            self._rounds += len(accepted_N)
            verified_N = verified_N or [min(n + 1, drafts) for n in accepted_N]
            self._acceptance.add(accepted_N, verified_N, stood_N)

    def record_time(self, batch: int, drafts: int, seconds: float) -> None:
        """Records the time of an undisturbed round.

        It counts after another of the same γ only, since part of a round's work may be done during the next. Times of
        all γ are taken to change as those of the γ in use do: the machine may be slower for a while.
        """
        size = batch.bit_length()
        previous, self._previous = self._previous, drafts
        self._times[size] += 1
        if self._times[size] <= UNTIMED or previous != drafts:
            return

        self._last_timed[size, drafts] = self._times[size]
        times = self._seconds[size, drafts]
        before = _mean(times) if len(times) >= TIMED else None
        times.append(seconds)

        if before and drafts == self._in_use(size):
            change = _mean(times) / before
            for gamma in (*self._choices, MAX_DRAFTS):
                if gamma != drafts:
                    others = self._seconds[size, gamma]
                    others.extend([change * one for one in others])

    def statistics(self) -> dict[str, Any]:
        """Counts since the start.

        Returns:
            rounds: of single sequences that drafted; verified, accepted: drafts; acceptance: their quotient, None
            before the first; accepted_per_round; acceptance_by_position: from the first draft of a round on;
            drafts_in_use: the γ last chosen, by largest batch size; guessed_rounds: those of `rounds` with guesses;
            guesses_stood: guesses that were the base's drafts.
        """
        verified, accepted = self._acceptance.verified, self._acceptance.accepted
        reached = [position for position in range(MAX_DRAFTS) if verified[position]]
        by_batch = {str(2**size - 1): gamma for size, gamma in sorted(self._last.items())} or {
            "all": self._fixed
        }
        return {
            "rounds": self._rounds,
            "verified": sum(verified),
            "accepted": sum(accepted),
            "acceptance": sum(accepted) / sum(verified) if sum(verified) else None,
            "accepted_per_round": sum(accepted) / self._rounds if self._rounds else None,
            "acceptance_by_position": [
                accepted[position] / verified[position] for position in reached
            ],
            "drafts_in_use": by_batch,
            "guessed_rounds": self._acceptance.guessed_rounds,
            "guesses_stood": self._acceptance.guesses_stood,
        }


def _round_seconds(drafts: int, known: Mapping[int, float]) -> float:
    """Seconds per round, taken to be linear between the γ whose times are known."""
    if drafts in known:
        return known[drafts]
    low, high = sorted(sorted(known, key=lambda g: abs(g - drafts))[:2])
    slope = (known[high] - known[low]) / (high - low)
    return max(known[low] + slope * (drafts - low), 0.5 * min(known.values()))


def _mean(seconds: Collection[float]) -> float:
    """Mean round time, outliers excluded."""
    most = OUTLIER * median(seconds)
    return fmean(one for one in seconds if one <= most)
