"""Rows of logits and settings in, token ids now and Decisions later."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from midlogit.decide.base import Decider

__all__ = ["decider_for"]


def decider_for(vocabulary: int, device: torch.device) -> Decider:
    """The fastest decider for whole rows on a device: kernels on CUDA where Triton is installed, else arrays.

    Args:
        vocabulary: ids below it are drawn.
    """
    from midlogit.decide.kernels import available

    if available(device):
        from midlogit.decide.kernels.decider import KernelDecider

        return KernelDecider(vocabulary, device)
    from midlogit.decide.array_decider import ArrayDecider

    return ArrayDecider(vocabulary)
