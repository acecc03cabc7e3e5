"""Two transformers models in one process: continuous batching over one KV cache a model."""

from midlogit.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
