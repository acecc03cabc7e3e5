"""Two OpenAI-compatible vLLM servers, or replicas of them, sampled as one model."""
