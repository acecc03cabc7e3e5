"""Whether two models can be shared by a number of devices; knows their configuration, loads nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence

from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.kinds import require_count
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.weights import key_value_heads

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # that torchrun and its like set


def require_sharable(ranks: int, checkpoints: Sequence[Checkpoint]) -> None:
    """Checks that this process can start the other ranks, and that whole heads fall to each.

    Args:
        ranks: how many share each of the models.

    Raises:
        InvalidRequest: says what is in the way.
    """
    require_count(tensor_parallel_size=ranks)
    if ranks == 1:
        return

    given = f"tensor_parallel_size is {ranks}"
    for checkpoint in checkpoints:
        heads, shared = int(checkpoint.config.num_attention_heads), key_value_heads(checkpoint)
        if heads % ranks or (shared % ranks and ranks % shared):
            raise InvalidRequest(
                f"{given}, and {checkpoint.name} has {heads} heads of attention, {shared} of keys and values.",
                "Each device takes whole heads: use a number that divides both models' heads.",
            )

    torch = require("torch", "local")
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        raise InvalidRequest(
            f"{given}, and {torch.cuda.device_count()} GPUs are visible.",
            "Use fewer, or make more visible by CUDA_VISIBLE_DEVICES.",
        )
    launched = [name for name in LAUNCHERS if name in os.environ]
    if launched or torch.distributed.is_initialized():
        why = f"{launched[0]} is set" if launched else "torch.distributed has process groups here"
        raise InvalidRequest(
            f"{given}, and {why}: this process is one of several already.",
            "The pair starts its other ranks itself: open it in a process that no launcher has started.",
        )
