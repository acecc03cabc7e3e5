"""Rollouts from q* inside verl, which loads this package as a plugin: it registers the agent loop "midlogit"."""

from midlogit.integrations.verl.agent_loop import MidlogitAgentLoop

__all__ = ["MidlogitAgentLoop"]
