"""CUDA graphs for decode steps of several lengths; knows model runner V1 and its dispatcher, no scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Numbers of sequences for which a decode step has CUDA graphs.
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class DecodeGraphs:
    """CUDA graphs of one model runner, by the number of tokens that a step computes per sequence.

    vLLM itself captures them for one such number, the largest (the last token and all drafts). This class captures
    those of the other numbers.

    Args:
        runner: vLLM's GPUModelRunner, after its own capture.
        lengths: further numbers of tokens per sequence.
        max_num_seqs: the largest batch.
    """

    def __init__(self, runner: Any, lengths: Sequence[int], max_num_seqs: int) -> None:
        self._runner = runner
        self._dispatchers = {runner.uniform_decode_query_len: runner.cudagraph_dispatcher}
        for tokens in lengths:
            self._capture(tokens, max_num_seqs)

    @contextmanager
    def selected(self, tokens: int | None) -> Iterator[None]:
        """Makes the runner use the CUDA graphs for `tokens` tokens per sequence, if any were captured.

        Args:
            tokens: None for a step that reads prompts: vLLM's own graphs are for any batch.
        """
        runner = self._runner
        original = runner.cudagraph_dispatcher, runner.uniform_decode_query_len

        if tokens is not None and tokens in self._dispatchers:
            runner.cudagraph_dispatcher = self._dispatchers[tokens]
            runner.uniform_decode_query_len = tokens
        try:
            yield
        finally:
            runner.cudagraph_dispatcher, runner.uniform_decode_query_len = original

    def _capture(self, tokens: int, max_num_seqs: int) -> None:
        """Captures the graphs for `tokens` tokens per sequence, where vLLM's own settings have decode graphs."""
        original = self._runner.cudagraph_dispatcher
        mode = original.cudagraph_mode
        if mode.decode_mode().name != "FULL" or not mode.separate_routine():
            return

        dispatcher = type(original)(self._runner.vllm_config)
        config = dispatcher.compilation_config = copy.copy(original.compilation_config)
        largest = original.compilation_config.max_cudagraph_capture_size
        sizes = [tokens * batch for batch in BATCH_SIZES if batch <= max_num_seqs]
        sizes = [size for size in sizes if size <= largest]
        config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = sizes, sizes[-1]
        dispatcher.uniform_decode_query_len = tokens
        dispatcher.initialize_cudagraph_keys(mode, tokens)

        for kind, keys in dispatcher.cudagraph_keys.items():
            if kind.name == "PIECEWISE":
                keys.clear()  # vLLM has captured those

        self._dispatchers[tokens] = dispatcher
        with self.selected(tokens):
            self._runner.capture_model()
