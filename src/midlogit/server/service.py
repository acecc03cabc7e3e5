"""State that all routes share: the pair once it is loaded, the gate, the metrics, the threads for slow work.

Knows how a request's rows are accepted, run and released; not what their answers look like.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from midlogit.delivery import Event
from midlogit.engines.draft_length import DraftLength
from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import Checkpoint, Model, files_of
from midlogit.outputs import Completion, Scores
from midlogit.pair import Pair
from midlogit.requests.sequence import Request
from midlogit.server.alone import Side
from midlogit.server.errors import ApiError
from midlogit.server.gate import RETRY_AFTER, Bodies, Gate, Pass
from midlogit.server.lanes import Lanes
from midlogit.server.logs import Redaction, logger
from midlogit.server.metrics import Metrics
from midlogit.server.settings import ServerSettings
from midlogit.server.vocabulary import Vocabulary
from midlogit.server.weights import Transport, transport_of

MODEL = "midlogit"
BODIES = 8  # bodies of the largest size that are held at once


class Service:
    """One server's state.

    Attributes:
        started: seconds since 1970.
        problem: why nothing can be served, "loading" or "stopping"; None when ready.
        transport: how new weights of the base arrive; None where none can.
        paused: whether a trainer has paused the pair.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.gate = Gate(settings.max_num_seqs, settings.max_queued, settings.max_completions)
        self.bodies = Bodies(BODIES * settings.max_body_bytes)
        self.lanes = Lanes()
        self.metrics = Metrics(self.gate, self._speculation)
        self.redact = Redaction()
        self.problem: str | None = "loading"
        self.started = int(time.time())
        self.transport: Transport | None = None
        self.paused = False
        self._pair: Pair | None = None
        self._vocabulary: Vocabulary | None = None
        self._files: Checkpoint | None = None
        for key in settings.api_keys:
            self.redact.hide(key, "[key]")

    def _speculation(self) -> dict[str, Any]:
        """Counts of drafts so far, as `DraftLength.statistics`."""
        nothing = DraftLength("off").statistics()
        return nothing if self._pair is None else dict(self._pair.statistics()["speculation"])

    def open(self, pair: Pair) -> None:
        """Serves this pair from now on.

        Raises:
            InvalidRequest: the teacher's tokenizer files are not on this machine.
        """
        self._files = tokenizer_files(pair.mixing.teacher)
        for side, checkpoint in (("base", pair.mixing.base), ("teacher", pair.mixing.teacher)):
            if "/" in checkpoint.name:
                self.redact.hide(checkpoint.name, f"the {side} model")
        pair.observer = self.metrics.sequence_ended
        self._vocabulary = Vocabulary(self._files)
        if self.settings.train:
            self.transport = transport_of(pair, self.settings.weights_root)
        self._pair = pair
        if self.problem == "loading":
            self.problem = None

    @property
    def pair(self) -> Pair:
        """The pair, ready for work.

        Raises:
            ApiError: 503 while it is loading, after it has failed, and once the server is stopping.
        """
        problem = self.problem if self.failure is None else "failed"
        if self._pair is None or problem is not None:
            raise ApiError(
                503,
                problem or "loading",
                f"The server is not ready: {problem}.",
                headers={"Retry-After": RETRY_AFTER},
            )
        return self._pair

    @property
    def failure(self) -> str | None:
        """What the engine died of; None while it lives."""
        return None if self._pair is None else self._pair.engine.failure

    @property
    def vocabulary(self) -> Vocabulary:
        assert self._vocabulary is not None, "asked for after `pair`"
        return self._vocabulary

    @property
    def files(self) -> Checkpoint:
        """The teacher's tokenizer files."""
        assert self._files is not None, "asked for after `pair`"
        return self._files

    @property
    def max_model_len(self) -> int:
        mixing = self.pair.mixing
        return min(mixing.base.max_context, mixing.teacher.max_context)

    def models(self, side: Side | None = None) -> list[str]:
        """Names of q*, or of one side alone; for a trainer also the checkpoint's, by which it asks for its policy."""
        model = side or MODEL
        if not self.settings.train:
            return [model]
        mixing = self.pair.mixing
        return [model, (mixing.teacher if side == "teacher" else mixing.base).name]

    def require_model(self, name: str | None, side: Side | None = None) -> None:
        """Checks the name of the model, which a request may leave out.

        Raises:
            ApiError: 404 for another name.
        """
        model = side or MODEL
        if name and name != model and name not in self.models(side):
            raise ApiError(
                404,
                "model_not_found",
                f"There is no model {name!r:.80} here. Use {model!r}.",
                param="model",
            )

    async def run(self, requests: Sequence[Request], entry: Pass) -> AsyncGenerator[Event, None]:
        """Runs requests and yields their events; their rows leave the gate as they end.

        Raises:
            EngineFailure: the engine has failed.
        """
        async with aclosing(self.pair.run(requests)) as events:
            async for event in events:
                if isinstance(event, Completion):
                    entry.leave()
                yield event

    async def score(self, requests: Sequence[Request]) -> list[Scores]:
        """The scores of the requests.

        Raises:
            ApiError: 500 when one of them could not be scored.
            EngineFailure: the engine has failed.
        """
        found = await self.pair.run_scores(requests)
        for scores in found:
            if scores.error is not None:
                logger.error("scoring failed: %s", scores.error)
                raise ApiError(
                    500, "engine_failure", "The engine failed; the server's log says how."
                )
            self.metrics.scored(len(scores.token_ids) - scores.first)
        return found

    def stop(self) -> None:
        """Refuses further requests."""
        self.problem = "stopping"

    def close(self) -> None:
        """Aborts what runs and closes the pair."""
        if self._pair is not None:
            self._pair.close()


def tokenizer_files(model: Model) -> Checkpoint:
    """The tokenizer files of a model.

    Raises:
        InvalidRequest: they are not on this machine.
    """
    files = files_of(model)
    if files is None:
        raise InvalidRequest(
            "The teacher's tokenizer files are not here.", "Name them: --teacher-tokenizer FOLDER."
        )
    return files


def display_name(name: str) -> str:
    """A checkpoint's name without its parent folders."""
    return Path(name).name if name.count("/") != 1 or Path(name).exists() else name
