"""One causal LM with its slot cache: feeds tokens to rows, returns the logits after them.

Knows torch and transformers; not that there is another model, nor what is done with logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from midlogit.engines.local.cache import SlotCache
from midlogit.errors import ModelUnavailable, first_line
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.modules import causal_lm

CHUNK = 512  # query columns of one prefill forward; bounds its activations


def cache_keyword(model: Any) -> str:
    """The name of the cache among the parameters of the model's forward: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards every part of it is as it was."""
    training = [part for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class SlotModel:
    """A model and the sequences in its cache; slots 0 … N − 1 are in use, and V ids have a logit.

    No tensor of inference mode is made: a backward pass would refuse it.

    Args:
        is_shared: the model is in training elsewhere; it is in evaluation mode for each forward only.

    Attributes:
        model: the transformers model, or an adapter around it. device: where its weights and logits are.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, *, is_shared: bool) -> None:
        self.model = model
        self._evaluating: Callable[[], AbstractContextManager[None]] = (
            partial(evaluating, model) if is_shared else nullcontext
        )
        self._cache = SlotCache(int(checkpoint.config.num_hidden_layers))
        self._cache_keyword = cache_keyword(causal_lm(model))
        self._lengths: list[int] = []
        self._written: list[
            int
        ] = []  # columns of each slot that were ever written, rolled-back ones among them
        self.device = next(model.parameters()).device

        try:
            self._require_rows_independent(checkpoint)
        except ModelUnavailable:
            raise
        except Exception as error:  # a configuration that the weights do not fit fails in many ways
            raise ModelUnavailable(
                f"{checkpoint.name} cannot be run: {first_line(error)}"
            ) from error

    def empty_logits(self) -> Tensor:
        """One row as wide as the model's logits and of their type, of no particular numbers."""
        width = int(causal_lm(self.model).config.get_text_config().vocab_size)
        return torch.empty((1, width), dtype=self.model.dtype, device=self.device)

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Opens a slot for each prompt and runs them; logits [N, V] after their last tokens."""
        first = len(self._lengths)
        self._lengths += [0] * len(prompts)
        self._written += [0] * len(prompts)
        return self._feed(slice(first, len(self._lengths)), prompts)[:, -1]

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Feeds one token to every slot in order; logits [N, V] after them."""
        return self.extend([[token] for token in tokens])[0]

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feeds equally many tokens to every slot in order; logits [tokens, N, V] after each."""
        return self._feed(slice(0, len(self._lengths)), tokens, keep=len(tokens[0])).transpose(0, 1)

    def roll_back(self, tokens: Sequence[int]) -> None:
        """Forgets the last tokens of every slot in order."""
        self._lengths = [length - n for length, n in zip(self._lengths, tokens, strict=True)]

    def refill(self, texts: Sequence[Sequence[int]], most: int) -> None:
        """Computes the tokens of every slot in order anew, as many slots at once as have `most` padded tokens."""
        self._lengths = [0] * len(self._lengths)
        first = 0
        while first < len(texts):
            end, longest = first + 1, len(texts[first])
            while end < len(texts):
                longest = max(longest, len(texts[end]))
                if longest * (end + 1 - first) > most:
                    break
                end += 1
            self._feed(slice(first, end), texts[first:end])
            first = end

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache."""
        return self._cache.num_bytes

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], last: int, chunk: int) -> Iterator[Tensor]:
        """Runs texts in slots of their own; yields the logits after each of their last `last` tokens.

        Texts are right-aligned: a text of fewer tokens has padding before them, whose logits mean nothing.

        Returns:
            [N, at most `chunk`, V] a time, in order. The slots are closed when all is read.
        """
        first, width = len(self._lengths), max(map(len, texts))
        self._lengths += [0] * len(texts)
        self._written += map(len, texts)
        view = slice(first, len(self._lengths))
        starts = [0] * len(texts)
        self._cache.reserve(len(self._lengths), width)

        for begin in range(0, width - last, CHUNK):
            self._forward(
                view, texts, starts, width, range(begin, min(begin + CHUNK, width - last))
            )
        for begin in range(width - last, width, chunk):
            span = range(begin, min(begin + chunk, width))
            yield self._forward(view, texts, starts, width, span, keep=len(span))

        for slot in reversed(range(view.start, view.stop)):
            self._lengths[slot] = len(texts[slot - first])
            self.remove(slot)

    @torch.no_grad()
    def remove(self, slot: int) -> None:
        """Closes a slot; the last sequence moves into it."""
        last, used = len(self._lengths) - 1, max(self._written[slot], self._written[-1])
        if slot != last:
            self._cache.copy(last, slot, used)
        self._cache.clear(last, used)
        for counts in (self._lengths, self._written):
            counts[slot] = counts[last]
            counts.pop()

    @torch.no_grad()
    def _feed(self, view: slice, tokens: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
        """Runs each row's new tokens, right-aligned to a common width, in chunks of it; logits after the last."""
        width = max(map(len, tokens))
        starts = self._lengths[view]
        self._cache.reserve(
            len(self._lengths), max(s + len(t) for s, t in zip(starts, tokens, strict=True))
        )

        for begin in range(0, width, CHUNK):
            span = range(begin, min(begin + CHUNK, width))
            logits_NQV = self._forward(view, tokens, starts, width, span, keep)

        for row, slot in enumerate(range(view.start, view.stop)):
            self._lengths[slot] += len(tokens[row])
            self._written[slot] = max(self._written[slot], self._lengths[slot])
        return logits_NQV

    def _forward(
        self,
        view: slice,
        tokens: Sequence[Sequence[int]],
        starts: list[int],
        width: int,
        span: range,
        keep: int = 1,
    ) -> Tensor:
        """One forward over the query columns `span` of the right-aligned tokens; logits [N, keep, V] of the last."""
        ids = [[0] * len(span) for _ in tokens]
        positions = [[0] * len(span) for _ in tokens]
        writes: list[tuple[int, int, int, int]] = []
        for row, (new, start) in enumerate(zip(tokens, starts, strict=True)):
            padding = width - len(new)
            for q, column in enumerate(span):
                if column >= padding:
                    position = start + column - padding
                    ids[row][q], positions[row][q] = new[column - padding], position
                    writes.append((row, q, view.start + row, position))

        cache = self._cache
        cache.view, cache.width = view, 1 + max(position for *_, position in writes)
        cache.writes = tuple(torch.tensor(writes, device=self.device).T.contiguous())

        positions_NQ = torch.tensor(positions, device=self.device)
        # A padding query sits at position 0 and sees column 0: harmless, and its output is not used.
        visible_NQK = (
            torch.arange(cache.width, device=self.device)[None, None, :] <= positions_NQ[:, :, None]
        )
        with self._evaluating():
            logits_NQV = self.model(
                input_ids=torch.tensor(ids, device=self.device),
                attention_mask=self._as_mask(visible_NQK[:, None]),
                position_ids=positions_NQ,
                use_cache=True,
                logits_to_keep=keep,
                **{self._cache_keyword: cache},
            ).logits
        return _at_least_float32(logits_NQV[:, -keep:])

    def _as_mask(self, visible_N1QK: Tensor) -> Tensor:
        """The mask in the form that the model's attention takes: additive for eager, boolean for sdpa."""
        if self.model.config._attn_implementation != "eager":
            return visible_N1QK
        dtype = self.model.dtype
        return torch.zeros(visible_N1QK.shape, dtype=dtype, device=self.device).masked_fill_(
            ~visible_N1QK, torch.finfo(dtype).min
        )

    def _require_rows_independent(self, checkpoint: Checkpoint) -> None:
        """Checks that the architecture honours positions, masks and cache as given.

        Two rows of different length, fed through the cache, must give what the model gives without one.
        """
        long, short = ([i % checkpoint.logit_size for i in ids] for ids in ((5, 6, 7, 8), (9, 10)))
        logits_NV = self.add([long[:3], short[:1]])
        logits_NV = self.advance([long[3], short[1]])
        eps = max(torch.finfo(dtype).eps for dtype in (self.model.dtype, *self._cache.dtypes))
        with torch.no_grad(), self._evaluating():
            for row, ids in enumerate((long, short)):
                plain_V = self.model(input_ids=torch.tensor([ids], device=self.device)).logits[
                    0, -1
                ]
                plain_V = _at_least_float32(plain_V)
                difference = (logits_NV[row] - plain_V).abs().max() / plain_V.std()
                if not difference < 20 * eps**0.5:
                    raise ModelUnavailable(
                        f"{checkpoint.name} does not give the same logits in a batch as alone"
                        f" (off by {float(difference):.2g} σ): the local engine cannot batch this architecture."
                    )
        self.remove(1)
        self.remove(0)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
