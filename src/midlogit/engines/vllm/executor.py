"""vLLM's executor for one rank: one worker in this process, and which rank it is. Knows no engine core."""

from __future__ import annotations

from typing import Any


def executor_of(rank: int, port: int) -> type[Any]:
    """A subclass of vLLM's executor of one process, for a rank of several on this machine.

    Args:
        port: where rank 0 brings the ranks together.
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    class RankExecutor(UniProcExecutor):  # type: ignore[misc]
        def _distributed_args(self) -> tuple[str, int, int]:
            return f"tcp://127.0.0.1:{port}", rank, rank

    return RankExecutor
