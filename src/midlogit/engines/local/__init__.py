"""Two transformers models in one process: continuous batching over one KV cache per model."""
