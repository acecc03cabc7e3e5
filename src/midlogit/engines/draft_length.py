"""How many tokens to draft ahead: as asked for, or as measured rounds say pays; knows times and counts, no rows.

A round drafts γ tokens with the base and has the teacher look at all of them at once; γ = 0 is lock-step. The choice
changes how fast tokens come, never which. Engines differ in what becomes of the teacher's row behind the last draft
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
FIRST_TRY = 4  # drafts of the first rounds that speculate
UNTIMED = 3  # first rounds of each batch size: they come behind prompts, and compilers run
TIMED = 7  # times of a batch size and γ that are needed before they are believed
KEPT = 15  # times that are kept
LOOK = 3  # rounds in a row that a γ gets so that its time is known; that of the first does not count
SOON = 3  # rounds between two looks as long as the times of a neighbour of the best γ are missing
PAUSE = 8  # the same afterwards, at least
REGRET = 0.01  # share of the tokens that looks may then cost
OUTLIER = 2.5  # times the median: a round that had to wait, not one of a γ whose rounds differ
DECAY = 0.999  # of acceptance counts, a round
PRIOR = 4.0, 5.0  # drafts that stood, of how many, before any were seen

SpeculationOption = int | Literal["auto", "off"]


def require_speculation(asked: SpeculationOption) -> None:
    """Checks what a user asked for.

    Raises:
        InvalidRequest: neither "auto", "off" nor 0 to MAX_DRAFTS.
    """
    whole = isinstance(asked, int) and not isinstance(asked, bool)
    if not (asked in ("auto", "off") or (whole and 0 <= int(asked) <= MAX_DRAFTS)):
        raise InvalidRequest(f"speculation is {asked!r}.", f"Use auto, off, or 0 to {MAX_DRAFTS} drafts a round.")


@dataclass(slots=True)
class Acceptance:
    """How often drafts stood, by their place in the round.

    Attributes:
        checked, stood: drafts that were reached, and those of them that stood, whole numbers since the start.
        recent: the same as decaying weights (stood, checked), for choosing γ.
    """

    checked: list[int]
    stood: list[int]
    recent: list[tuple[float, float]]

    @classmethod
    def empty(cls) -> Acceptance:
        return cls([0] * MAX_DRAFTS, [0] * MAX_DRAFTS, [(0.0, 0.0)] * MAX_DRAFTS)

    def add(self, stood_B: Sequence[int], checked_B: Sequence[int]) -> None:
        """Counts a round: how many drafts were looked at in each row, and the first of them that stood."""
        for place in range(max(checked_B, default=0)):
            reached = sum(checked > place for checked in checked_B)
            kept = sum(stood > place for stood in stood_B)
            self.checked[place] += reached
            self.stood[place] += kept
            weight, total = self.recent[place]
            self.recent[place] = (DECAY * weight + kept, DECAY * total + reached)

    def tokens(self, drafts: int, reuses_bonus_row: bool) -> float:
        """Expected tokens a round.

        Args:
            reuses_bonus_row: whether the bonus row decides the first token of the next round; otherwise it gives a
                token in the same round, if all drafts were accepted.
        """
        weight = PRIOR[1]
        stood = PRIOR[0] + sum(kept for kept, _ in self.recent)
        checked = PRIOR[1] + sum(reached for _, reached in self.recent)
        stand = [1.0]  # the probability that so many drafts stand
        for kept, reached in self.recent[:drafts]:  # a place that was seen little is taken to be like all others
            stand.append(stand[-1] * (kept + weight * stood / checked) / (reached + weight))
        if not reuses_bonus_row or not drafts:
            return sum(stand)
        # One draft fewer where the first token is known. It is behind a round whose drafts all stood.
        plain, known = sum(stand[:-1]), 1 + sum(stand[:-2])
        share = stand[-1] / (1 - stand[-2] + stand[-1])
        return plain + share * (known - plain)


class DraftLength:
    """Chooses γ for each round and counts what became of it.

    Args:
        asked: "auto", "off", or a fixed number of drafts.
        choices: the γ that the engine can run, in order, 0 among them; "auto" chooses among these.
        reuses_bonus_row: as `Acceptance.tokens` has it.

    Attributes:
        choices: the γ above 0 that a round may have, in order.
    """

    def __init__(
        self, asked: SpeculationOption, choices: Sequence[int] = range(9), *, reuses_bonus_row: bool = False
    ) -> None:
        require_speculation(asked)
        self._reuses_bonus_row = reuses_bonus_row
        self._auto = asked == "auto"
        self._fixed = 0 if isinstance(asked, str) else asked
        self._choices = list(choices)
        self._acceptance = Acceptance.empty()
        self._seconds: defaultdict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._timed: defaultdict[tuple[int, int], int] = defaultdict(int)  # the number of the last time
        self._times: Counter[int] = Counter()  # by batch size
        self._behind: int | None = None  # γ of the last time
        self._best: dict[int, int] = {}  # by batch size, as the next two
        self._planned: defaultdict[int, list[int]] = defaultdict(list)  # γ of the rounds that were chosen together
        self._since_look: Counter[int] = Counter()
        self._rounds = 0
        self._last: dict[int, int] = {}

    @property
    def choices(self) -> list[int]:
        return [g for g in (self._choices if self._auto else (self._fixed,)) if g]

    @property
    def fixed(self) -> bool:
        """Whether the number was given, not left to be chosen."""
        return not self._auto

    def next(self, batch: int) -> int:
        """γ for the next round of so many sequences."""
        if not self._auto:
            return self._fixed
        size = batch.bit_length()
        if not self._planned[size]:
            self._planned[size] = self._next_lengths(size)
        self._last[size] = self._planned[size].pop()
        return self._last[size]

    def _next_lengths(self, size: int) -> list[int]:
        """γ for the next rounds."""
        kept = {g: self._seconds[size, g] for g in self._choices}
        known = {g: _mean(seconds) for g, seconds in kept.items() if len(seconds) >= TIMED}
        first = min(self._choices, key=lambda g: abs(g - FIRST_TRY))
        missing = [g for g in (first, 0) if g not in known]
        if missing:  # in turns, since the machine may become slower or faster
            return [min(missing, key=lambda g: self._timed[size, g])] * LOOK
        speeds = {
            g: self._acceptance.tokens(g, self._reuses_bonus_row) / _round_seconds(g, known) for g in self._choices
        }
        best = self._best[size] = max(speeds, key=speeds.__getitem__)
        place = self._choices.index(best)
        around = {0, *self._choices[max(place - 1, 0) : place + 2]} - {best}
        if best not in known or not around:
            return [best]
        other = min(around, key=lambda g: (g in known, self._timed[size, g]))
        pause: float = SOON
        if other in known:
            lost = 1 - speeds[other] / speeds[best]  # of what is drawn meanwhile
            pause = max(PAUSE, lost * LOOK * known[other] / known[best] / REGRET)
        self._since_look[size] += 1
        if self._since_look[size] < pause:
            return [best]
        self._since_look[size] = 0
        return [other] * LOOK

    def record_acceptance(self, drafts: int, stood_B: Sequence[int], checked_B: Sequence[int] | None = None) -> None:
        """Counts a round.

        Args:
            drafts: its γ. stood_B: how many drafts stood in each sequence.
            checked_B: how many were looked at; by default one more than stood, or all. A sequence that ended on a
                draft leaves the others unknown.
        """
        if drafts:
            self._rounds += len(stood_B)
            self._acceptance.add(stood_B, checked_B or [min(stood + 1, drafts) for stood in stood_B])

    def record_time(self, batch: int, drafts: int, seconds: float) -> None:
        """What an undisturbed round took.

        It counts behind another like it: part of a round's work may be done during the next. Times of all γ are taken
        to change as those of the γ in use do: the machine may be slower for a while.
        """
        size = batch.bit_length()
        behind, self._behind = self._behind, drafts
        self._times[size] += 1
        if self._times[size] <= UNTIMED or behind != drafts:
            return
        self._timed[size, drafts] = self._times[size]
        kept = self._seconds[size, drafts]
        before = _mean(kept) if len(kept) >= TIMED else None
        kept.append(seconds)
        if before and drafts == self._best.get(size):
            change = _mean(kept) / before
            for gamma in self._choices:
                if gamma != drafts:
                    others = self._seconds[size, gamma]
                    others.extend([change * one for one in others])

    def statistics(self) -> dict[str, Any]:
        """Counts since the start.

        Returns:
            rounds: of single sequences that drafted; checked, accepted: drafts; acceptance: their quotient, None
            before the first; accepted_per_round; acceptance_by_position: from the first draft of a round on;
            drafts_in_use: the γ last chosen, by largest batch size.
        """
        checked, stood = self._acceptance.checked, self._acceptance.stood
        reached = [place for place in range(MAX_DRAFTS) if checked[place]]
        by_batch = {str(2**size - 1): gamma for size, gamma in sorted(self._last.items())} or {"all": self._fixed}
        return {
            "rounds": self._rounds,
            "verified": sum(checked),
            "accepted": sum(stood),
            "acceptance": sum(stood) / sum(checked) if sum(checked) else None,
            "accepted_per_round": sum(stood) / self._rounds if self._rounds else None,
            "acceptance_by_position": [stood[place] / checked[place] for place in reached],
            "drafts_in_use": by_batch,
        }


def _round_seconds(drafts: int, known: Mapping[int, float]) -> float:
    """What a round takes; between γ whose times are known they are taken to be linear."""
    if drafts in known:
        return known[drafts]
    low, high = sorted(sorted(known, key=lambda g: abs(g - drafts))[:2])
    slope = (known[high] - known[low]) / (high - low)
    return max(known[low] + slope * (drafts - low), 0.5 * min(known.values()))


def _mean(seconds: Collection[float]) -> float:
    """What a round takes on the mean, but for those that something else held up."""
    most = OUTLIER * median(seconds)
    return fmean(one for one in seconds if one <= most)
