"""A text to score, in the form in which the engine runs sequences; knows its tokens, no core and no decider.

Its tokens are given, one a step, and described instead of drawn: it shares every step with what is generated.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from midlogit.decide.base import RowSettings
from midlogit.outputs import Decision
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence


class GivenRequest(NamedTuple):
    """What the models read before the first given token, and how many are given."""

    base_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    max_new_tokens: int


class GivenSequence:
    """The state of one text, of which at least one token is given."""

    def __init__(self, text: Scored) -> None:
        asked = text.request
        self.text = text
        self.request = GivenRequest(
            asked.base_ids[: -asked.given], asked.teacher_ids[: -asked.given], asked.given
        )
        self._settings = text.settings
        self._decisions: list[Decision] = []

    @property
    def is_finished(self) -> bool:
        return self.text.is_finished

    def settings_at(self, position: int) -> RowSettings:
        """Settings of a given token; beyond the last one those of the last, for drafts that nobody keeps."""
        return self._settings[min(position, len(self._settings) - 1)]

    def ends_with(self, token_id: int, position: int) -> bool:
        """Whether the token at `position` is the last given one."""
        return position == len(self._settings) - 1

    def append(self, decision: Decision, weight_version: int | str | None = None) -> None:
        """Takes the description of the next token."""
        self._decisions.append(decision)
        if len(self._decisions) == len(self._settings):
            self.text.finish(self._decisions)

    def abort(self) -> None:
        """Ends the text because the engine was closed, or for a pause that keeps nothing."""
        self.text.abort()

    def fail(self, message: str) -> None:
        """Ends the text with an error of the engine."""
        self.text.fail(message)


Run = Sequence | GivenSequence  # what the engine runs


class Read(Protocol):
    """What the models read before the first token, and how many tokens may follow."""

    @property
    def base_ids(self) -> tuple[int, ...]: ...
    @property
    def teacher_ids(self) -> tuple[int, ...]: ...
    @property
    def max_new_tokens(self) -> int: ...


class Drawn(Protocol):
    """What drawing needs to know of a sequence: nothing of its text."""

    @property
    def request(self) -> Read: ...
    def settings_at(self, position: int) -> RowSettings: ...
    def ends_with(self, token_id: int, position: int) -> bool: ...
