"""An OpenAI-compatible HTTP server over one Pair: q* of two models as one model behind /v1."""
