"""Two models on vLLM inside this process: its scheduler, paged attention and CUDA graphs, the whole vocabulary."""
