"""Whether a server still has the weights that it should have; knows its fingerprints, not whose rows they concern."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from midlogit.engines.http import rows
from midlogit.engines.http.client import CallFailed, Client
from midlogit.engines.http.exchange import KEEP_ALIVE
from midlogit.engines.http.fingerprints import PROMPTS, Fingerprint, differ, fingerprint
from midlogit.engines.http.handshake import ServerFacts

log = logging.getLogger("midlogit")

CHECK_EVERY = 60.0  # seconds after which weights are checked again


class WeightWatch:
    """Compares the fingerprint of one server with an earlier one, whenever the server may have been started again.

    Attributes:
        found_others: whether the server was found to have other weights than it should have.
    """

    def __init__(self, client: Client, facts: ServerFacts) -> None:
        self.found_others = False
        self._client = client
        self._facts = facts
        self._expected: Fingerprint = facts.fingerprint  # empty for weights not seen yet
        self._answered = self._checked = monotonic()
        self._check: asyncio.Task[CallFailed | None] | None = None

    @property
    def is_due(self) -> bool:
        """Whether to check before using more rows: after a failure, without an open connection, or after a while."""
        now = monotonic()
        return now - self._checked > CHECK_EVERY or now - self._answered > KEEP_ALIVE

    def note_answer(self) -> None:
        """Notes that the server has answered a call just now."""
        self._answered = monotonic()

    def note_failure(self) -> None:
        """Notes that the server may have been started again."""
        self._checked = 0.0

    def expect_new(self) -> None:
        """Takes the weights that the server has at the next check for those that it should have."""
        self.found_others = False
        self._expected = []
        self._checked = 0.0

    async def check(self) -> None:
        """Checks the weights; calls at the same time share one check.

        Raises:
            CallFailed: the server did not give its fingerprint.
        """
        if self._check is None or self._check.done():
            self._check = self._client.loop.create_task(self._compare())
        failure = await asyncio.shield(self._check)
        if failure is not None:
            raise failure

    async def _compare(self) -> CallFailed | None:
        """Notes whether the weights are those that they should be; returns what prevented it."""
        facts, expected = self._facts, self._expected
        body = rows.top_body(facts.model, PROMPTS, len(facts.fingerprint[0]))
        try:
            found = await self._client.call_once(
                facts.endpoint,
                "/completions",
                body,
                lambda answer: fingerprint(rows.read_top(answer, body, facts.form)),
                fresh=True,
            )
        except CallFailed as failure:
            return failure

        if expected is not self._expected:  # new weights came meanwhile
            return None
        self._answered = self._checked = monotonic()
        if not expected:
            self._expected = found
            return None

        was_known, self.found_others = self.found_others, differ(expected, found)
        if self.found_others and not was_known:
            log.warning(
                "The %s serves other weights than before under the same name; completions that are drawn from them "
                "name the side in weights_changed. After an update on purpose, call Pair.update_base.",
                facts.endpoint.name,
            )
        return None
