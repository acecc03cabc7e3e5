"""How new weights of the base reach the server, by files or by the engine's own transfer; knows no route.

An update has parts: `start` opens it, `update` adds a part, `finish` ends it. Of files nothing is used before the end,
so a trainer that dies in between leaves nothing behind: the next `start` forgets what was there.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.engines.base import Weights, WeightTransfer
from midlogit.errors import first_line
from midlogit.pair import Pair
from midlogit.server.errors import ApiError

if TYPE_CHECKING:
    from torch import Tensor

WAIT_S = 600.0  # for a file that a trainer has announced
POLL_S = 0.02

Version = int | str | None


class Transport(ABC):
    """A way of new weights to the base, in the four calls of vLLM's control plane.

    Attributes:
        backend: its name there.
    """

    backend: str

    async def world_size(self) -> int:
        """How many processes of the base take part."""
        return 1

    @abstractmethod
    async def init(self, info: dict[str, Any]) -> None:
        """Meets the trainer."""

    @abstractmethod
    async def start(self) -> None:
        """Opens an update; one that is open is forgotten."""

    @abstractmethod
    async def update(self, info: dict[str, Any]) -> None:
        """Takes a part of the weights."""

    @abstractmethod
    async def finish(self, version: Version) -> None:
        """Ends the update: from now on the base has its weights, under a version or the next number."""


class FileTransport(Transport):
    """Safetensors files below a folder.

    A trainer names a file or a folder of them, in `path`. One that names none, as those do that expect NCCL, writes
    PORT.safetensors, with the port of its `init`, under another name and renames it; the file is removed as it is read.
    """

    backend = "disk"

    def __init__(self, pair: Pair, root: Path) -> None:
        self._pair = pair
        self._root = root.resolve()
        self._port: int | None = None
        self._parts: list[Part] | None = None

    async def init(self, info: dict[str, Any]) -> None:
        port = info.get("master_port")
        self._port = port if isinstance(port, int) else None

    async def start(self) -> None:
        self._parts = []

    async def update(self, info: dict[str, Any]) -> None:
        parts = self._parts
        if parts is None:
            raise ApiError(409, "no_update", "No weight update was started.")
        if info.get("path") is not None:
            parts.append(await asyncio.to_thread(self.read, info["path"]))
            return

        file = await self._announced()
        if set(info.get("names", ())) != file.names:
            raise ApiError(
                400, "weight_mismatch", "The file holds other names than were announced."
            )
        parts.append(Part([file]))

    async def finish(self, version: Version) -> None:
        parts, self._parts = self._parts, None
        if parts is None:
            raise ApiError(409, "no_update", "No weight update was started.")
        await self.apply(parts, version)

    async def apply(self, parts: list[Part], version: Version) -> None:
        """Gives the base the weights of these parts; of one that is a folder, the folder, which servers can read."""
        weights: Weights = (named for part in parts for file in part.files for named in file)
        if len(parts) == 1 and parts[0].folder is not None:
            weights = parts[0].folder
        await asyncio.to_thread(self._pair.update_base, weights, version=version)

    async def _announced(self) -> WeightFile:
        """The file that the trainer writes under its port's number, as soon as it is there."""
        if self._port is None:
            raise ApiError(
                400, "invalid_request", "update_info names no path, and no port was agreed on."
            )
        path = self._root / f"{self._port}.safetensors"
        try:
            async with asyncio.timeout(WAIT_S):
                while not path.exists():
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ApiError(
                408, "no_weights", f"{path.name} did not come within {WAIT_S:g} s."
            ) from None

        path = self._inside(path)
        try:
            return await asyncio.to_thread(WeightFile, path)
        finally:
            path.unlink()

    def read(self, name: Any) -> Part:
        """The files of a path: it alone, or all of a folder.

        Raises:
            ApiError: 400 outside the root, also by a link; 404 not there; 400 no whole safetensors file.
        """
        if not isinstance(name, str):
            raise ApiError(422, "invalid_type", "The path of the weights must be a string.")
        path = self._inside(self._root / name)
        paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not paths or not path.exists():
            raise ApiError(404, "no_weights", f"No safetensors file is at {name!r:.200}.")
        files = [WeightFile(self._inside(path)) for path in paths]
        return Part(files, path if path.is_dir() else None)

    def _inside(self, path: Path) -> Path:
        """The path without links.

        Raises:
            ApiError: 400 outside the root.
        """
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a circle of links, or no path at all
            resolved = Path("/")
        if not resolved.is_relative_to(self._root) or resolved == Path("/"):
            raise ApiError(400, "outside_root", "Weights must lie below --weights-root.")
        return resolved


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an update: open files, and the folder that holds them if all of it is meant."""

    files: list[WeightFile]
    folder: Path | None = None


class EngineTransport(Transport):
    """vLLM's own transfer, such as NCCL, into the base of an engine that can receive it."""

    def __init__(self, engine: WeightTransfer, backend: str) -> None:
        self._engine = engine
        self.backend = backend

    async def world_size(self) -> int:
        return await asyncio.to_thread(lambda: self._engine.transfer_world_size)

    async def init(self, info: dict[str, Any]) -> None:
        await asyncio.to_thread(self._engine.init_weight_transfer_engine, info)

    async def start(self) -> None:
        await asyncio.to_thread(self._engine.start_weight_update)

    async def update(self, info: dict[str, Any]) -> None:
        await asyncio.to_thread(self._engine.update_weights, info)

    async def finish(self, version: Version) -> None:
        await asyncio.to_thread(self._engine.finish_weight_update, version=version)


def transport_of(pair: Pair, root: Path | None) -> Transport | None:
    """How a trainer gives this pair new weights: by files where there is a folder for them; None for no way."""
    if root is not None:
        return FileTransport(pair, root)
    engine = pair.engine
    if isinstance(engine, WeightTransfer) and engine.transfer_backend is not None:
        return EngineTransport(engine, engine.transfer_backend)
    return None


class WeightFile:
    """One safetensors file, open: an iterator of its named tensors, which are read as they are asked for.

    Raises:
        ApiError: 400 for anything else, and for a torn one.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise ApiError(400, "no_safetensors", f"{path.name} is no .safetensors file.")
        self._file = _opened(path)
        self.names = set(self._file.keys())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.names):
            yield name, self._file.get_tensor(name)


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ApiError(
            400,
            "torn_weights",
            f"{path.name} is no whole safetensors file: {first_line(error)}. "
            "Write it under another name, then rename it.",
        ) from None
