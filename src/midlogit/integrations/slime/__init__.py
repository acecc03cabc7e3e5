"""Rollouts from q* inside slime; imports neither slime nor torch."""

from midlogit.integrations.slime.rollout import generate

__all__ = ["generate"]
