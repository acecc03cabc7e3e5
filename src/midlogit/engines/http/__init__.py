"""The HTTP engine: two OpenAI-compatible vLLM servers, sampled as one model."""

from midlogit.engines.http.engine import HttpEngine

__all__ = ["HttpEngine"]
