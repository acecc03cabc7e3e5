"""The in-process vLLM engine; importing this package imports torch, but not vLLM."""

from midlogit.engines.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
