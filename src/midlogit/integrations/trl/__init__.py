"""Rollouts from q* inside TRL's trainers; imports neither TRL nor torch by itself."""

from midlogit.integrations.trl.attach import attach
from midlogit.integrations.trl.generation import MidlogitGeneration
from midlogit.integrations.trl.stop_ids import align_stop_ids

__all__ = ["MidlogitGeneration", "align_stop_ids", "attach"]
