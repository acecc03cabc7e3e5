"""New weights for the base's servers, and pauses; knows vLLM's control calls and the gate, draws nothing.

vLLM serves these calls where it was started with VLLM_SERVER_DEV_MODE=1. A server computes each row from a prefix of
tokens, so after its prefix cache is reset the running sequences are computed anew by themselves.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from midlogit.engines.base import Engine, Pausing, Running, Updating, Weights
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.http.client import CallFailed, Client, Endpoint
from midlogit.engines.http.paired_sides import PairedSides
from midlogit.engines.http.rounds import Gate
from midlogit.engines.http.weights import check_folder, layout_of
from midlogit.errors import EngineFailure, InvalidRequest, ServerUnavailable
from midlogit.requests.sequence import Sequence

T = TypeVar("T")

DEV_MODE = "Start the base's servers with VLLM_SERVER_DEV_MODE=1."
WAITS = (
    "Its weights may be half new. Requests wait until an update is complete:"
    " send the weights again, or call update_base."
)


def require_recompute(running: Running) -> None:
    """Checks what becomes of running requests.

    Raises:
        InvalidRequest: "keep", which servers cannot do.
    """
    if running == "keep":
        raise InvalidRequest(
            "Servers cannot keep what they cached for running requests alone.",
            'Use running="recompute" or "abort".',
        )


class UpdatedServers(Engine, Updating):
    """The part of the HTTP engine that replaces the base's weights.

    Args:
        served: what the base's servers were started with, a folder or hub id.
    """

    def __init__(
        self,
        client: Client,
        sides: PairedSides,
        served: str,
        draft_length: DraftLength,
        max_num_seqs: int,
    ) -> None:
        super().__init__(draft_length, max_num_seqs)
        self.client = client
        self.sides = sides
        self._layout = layout_of(Path(served))
        self._gate = Gate()
        self._updates = asyncio.Lock()
        self._is_paused = False
        self._is_half_loaded = False
        self._held: deque[Sequence] = deque()  # that came during a pause
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._closed = False

    @abstractmethod
    def _admit(self) -> None:
        """Starts waiting sequences while there is room."""

    @abstractmethod
    def _cancel(self, keys: Collection[int]) -> None:
        """Ends sequences by their ids."""

    def update_base(
        self,
        weights: Weights | None,
        *,
        version: int | str | None = None,
        running: Running = "recompute",
    ) -> None:
        require_recompute(running)
        if weights is not None and not isinstance(weights, Path):
            raise InvalidRequest(
                "Servers take no tensors from here.",
                "Give a folder that they can read, or None once they have new weights.",
            )
        if weights is not None:
            check_folder(weights, self._layout)
        self._run_in_loop(self._update_base(weights, version, running))

    def pause(self, running: Pausing) -> None:
        self._run_in_loop(self._pause(running))

    def resume(self) -> None:
        self._run_in_loop(self._resume())

    def _run_in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise EngineFailure("The engine is closed.", "Open the pair again.")
        return self.client.run(work)

    @property
    def _servers(self) -> list[Endpoint]:
        """All of the base."""
        return [replica.endpoint for replica in self.sides.base.replicas.replicas]

    async def _update_base(
        self, folder: Path | None, version: int | str | None, running: Running
    ) -> None:
        async with self._updates:
            await self._gate.shut()
            try:
                if running == "abort":
                    self._cancel(set(self._running))
                await self._load(folder)
                self._count_update(version)
            finally:
                self._open_gate()

    def _count_update(self, version: int | str | None) -> None:
        super()._count_update(version)
        self.sides.base.replicas.expect_new_weights()

    async def _load(self, folder: Path | None) -> None:
        """Has the servers load a folder, None where they have new weights already, and forget what they cached."""
        try:
            await self._on_all("/pause?mode=keep", {})
            if folder is not None:
                self._is_half_loaded = True
                path = {"weights_path": str(folder.resolve())}
                await self._on_all("/collective_rpc", {"method": "reload_weights", "kwargs": path})
            await self._on_all("/reset_prefix_cache?reset_running_requests=true", {})
            self._is_half_loaded = False
        finally:
            await self._on_all("/resume", {})

    async def _on_all(
        self,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], Any] = lambda answer: answer,
    ) -> list[Any]:
        """Makes one of vLLM's control calls to all servers at once.

        Args:
            read: makes a result of an answer.

        Returns:
            The results in the servers' order.

        Raises:
            InvalidRequest, ServerUnavailable: as `_control`, of the first that failed, after all have ended.
        """
        calls = [self._control(server, path, body, read) for server in self._servers]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def _control(
        self,
        server: Endpoint,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], Any] = lambda answer: answer,
    ) -> Any:
        """Makes one of vLLM's control calls, a GET without a body.

        Raises:
            InvalidRequest: the server does not serve it. ServerUnavailable: it failed.
        """
        try:
            return await self.client.call_once(server, "/" + path, body, read)
        except CallFailed as failure:
            where = f"The {server.name} cannot be updated: {failure.message} from {path}."
            if failure.status == 404:
                raise InvalidRequest(where, DEV_MODE) from failure
            raise ServerUnavailable(where, WAITS if self._is_half_loaded else "") from failure

    async def _pause(self, running: Pausing) -> None:
        self._is_paused = True
        if running == "abort":
            self._cancel({id(sequence) for sequence in self._waiting} | self._running.keys())
        while running == "wait" and self._is_paused and (self._running or self._waiting):
            await asyncio.wait(list(self._running.values()))
            await asyncio.sleep(0)  # what has ended makes room for what waits
        if self._is_paused:
            await self._gate.shut()

    async def _resume(self) -> None:
        self._is_paused = False
        self._waiting += self._held
        self._held.clear()
        self._open_gate()
        self._admit()

    def _open_gate(self) -> None:
        if not self._is_paused and not self._is_half_loaded:
            self._gate.open()
