"""Weights that the base's servers receive from a trainer; forwards vLLM's calls to all of them, sees no tensor.

From the start of an update to its end the servers are paused and nothing is drawn. What a trainer announces is checked
by name and shape where the model's files are on this machine; values are checked by nobody.
"""

from __future__ import annotations

import asyncio
from itertools import accumulate
from pathlib import Path
from typing import Any

from midlogit.engines.base import Running, WeightTransfer
from midlogit.engines.http.client import CallFailed
from midlogit.engines.http.updates import WAITS, UpdatedServers, require_recompute
from midlogit.errors import InvalidRequest, WeightMismatch


class ReceivingServers(UpdatedServers, WeightTransfer):
    """The part of the HTTP engine that passes a trainer's calls on to the base's servers."""

    _received: set[str] | None = None  # names that were announced since an update has begun

    @property
    def transfer_backend(self) -> str | None:
        return self._run_in_loop(self._backend())

    @property
    def transfer_world_size(self) -> int:
        return self._run_in_loop(self._world_size())

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._run_in_loop(self._init(init_info))

    def start_weight_update(self) -> None:
        self._run_in_loop(self._start())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._run_in_loop(self._receive(update_info))

    def finish_weight_update(
        self, *, version: int | str | None = None, running: Running = "recompute"
    ) -> None:
        require_recompute(running)
        self._run_in_loop(self._finish(version, running))

    async def _backend(self) -> str | None:
        path = "//server_info?config_format=json"
        try:
            backend: str | None = await self.client.call_once(
                self._servers[0], path, read=_backend_in
            )
        except CallFailed:  # not in development mode
            return None
        return backend

    async def _world_size(self) -> int:
        return sum(await self._world_sizes())

    async def _world_sizes(self) -> list[int]:
        return await self._on_all("/get_world_size", None, lambda answer: int(answer["world_size"]))

    async def _init(self, init_info: dict[str, Any]) -> None:
        """Each server's ranks follow those of the one before it."""
        infos = [init_info] * len(self._servers)
        if "rank_offset" in init_info:
            sizes = await self._world_sizes()
            offsets = accumulate(sizes[:-1], initial=init_info["rank_offset"])
            infos = [init_info | {"rank_offset": offset} for offset in offsets]

        path = "/init_weight_transfer_engine"
        calls = zip(self._servers, infos, strict=True)
        await asyncio.gather(
            *(self._control(server, path, {"init_info": info}) for server, info in calls)
        )

    async def _start(self) -> None:
        """Begins an update, and in the place of one that was never finished another."""
        async with self._updates:
            await self._gate.shut()
            try:
                await self._end_unfinished()
                await self._on_all("/pause?mode=keep", {})
                await self._on_all("/start_weight_update", {})
                self._is_half_loaded = True
                self._received = set()
            finally:
                await self._go_on()

    async def _receive(self, update_info: dict[str, Any]) -> None:
        async with self._updates:
            received = self._names_so_far()
            names, shapes = update_info.get("names", ()), update_info.get("shapes", ())
            if self._layout is not None:
                try:
                    for name, shape in zip(names, shapes, strict=False):  # vLLM checks their number
                        self._layout.require_known(name, tuple(shape))
                except WeightMismatch as error:
                    await self._refuse(error)

            self._received = None
            await self._on_all("/update_weights", {"update_info": update_info})
            self._received = received | set(names)

    async def _finish(self, version: int | str | None, running: Running) -> None:
        async with self._updates:
            names = self._names_so_far()
            if self._layout is not None:
                try:
                    self._layout.require_complete(names)
                except WeightMismatch as error:
                    await self._refuse(error)

            await self._end_unfinished()
            if running == "abort":
                self._cancel(set(self._running))
            await self._on_all("/reset_prefix_cache?reset_running_requests=true", {})
            self._is_half_loaded = False
            self._count_update(version)
            await self._go_on()

    async def _load(self, folder: Path | None) -> None:
        await self._end_unfinished()
        await super()._load(folder)

    def _names_so_far(self) -> set[str]:
        if self._received is None:
            raise InvalidRequest("No update has begun.", "Call start_weight_update first.")
        return self._received

    async def _refuse(self, error: WeightMismatch) -> None:
        """Ends an update of which nothing has come, so that the old weights stay; of another, waits for the rest.

        Raises:
            WeightMismatch: always.
        """
        if self._received:
            raise WeightMismatch(error.args[0], WAITS) from error
        await self._end_unfinished()  # vLLM puts back what no tensor came for
        self._is_half_loaded = False
        await self._go_on()
        raise error

    async def _end_unfinished(self) -> None:
        if self._received is not None:
            self._received = None
            await self._on_all("/finish_weight_update", {})

    async def _go_on(self) -> None:
        """Lets servers and requests run on, unless weights are half new."""
        if not self._is_half_loaded:
            await self._on_all("/resume", {})
        self._open_gate()


def _backend_in(answer: Any) -> str | None:
    """The backend of transfers in a server's answer to /server_info."""
    config = answer["vllm_config"]["weight_transfer_config"]
    return None if config is None else str(config["backend"])
