"""Two models together: aligned ids, merged stop ids, masks, the alphabet of each request.

Knows both tokenizers and the request's parameters; runs no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from midlogit.core.outcomes import Outcomes, StopId
from midlogit.errors import InvalidRequest, PairMismatch
from midlogit.models.alignment import Alignment, align, require_mixable
from midlogit.models.checkpoint import Model
from midlogit.params import SamplingParams

KEPT_OUTCOMES = 64  # alphabets kept for later requests


@dataclass(frozen=True)
class Mixing:
    """Two checkpoints that are to be mixed.

    Attributes:
        max_logprobs: log-probabilities per position that the servers of both list; None where whole rows are seen.
    """

    base: Model
    teacher: Model
    max_logprobs: int | None = None
    _cached: Callable[..., Outcomes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Several threads ask at once; whoever asks for ever new alphabets must not fill the memory.
        object.__setattr__(self, "_cached", lru_cache(maxsize=KEPT_OUTCOMES)(self._make_outcomes))

    @cached_property
    def alignment(self) -> Alignment:
        base, teacher = self.base, self.teacher
        if base.vocabulary is None or teacher.vocabulary is None:
            return Alignment.taken_for_granted(min(base.logit_size, teacher.logit_size))
        return align(base.vocabulary, teacher.vocabulary, base.logit_size, teacher.logit_size)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Stop ids of either model: those that both models have, the teacher's first, then those of one alone."""
        ids = [
            i for model in (self.teacher, self.base) for i in model.stop_ids if i < model.logit_size
        ]
        return tuple(sorted(dict.fromkeys(ids), key=lambda i: i >= self.alignment.size))

    @property
    def stops_of_one_model(self) -> dict[int, str]:
        """Stop ids beyond the other model's vocabulary, and the side that has them."""
        side = "base" if self.base.logit_size > self.teacher.logit_size else "teacher"
        return {i: side for i in self.stop_ids if i >= self.alignment.size}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Special ids of either tokenizer that end no sequence."""
        return (self.base.special_ids | self.teacher.special_ids) - set(self.stop_ids)

    def require_mixable(self) -> None:
        """Checks that the two models can be mixed.

        Raises:
            PairMismatch: the tokenizers disagree, or no id of the stop class exists in one of the models.
        """
        require_mixable(self.alignment)
        if self.stop_ids and self.stop_ids[0] >= self.alignment.size:
            (stop_id, side), *_ = self.stops_of_one_model.items()
            other = "teacher" if side == "base" else "base"
            raise PairMismatch(
                f"The {side} ends a text with id {stop_id}, which the {other} does not have,"
                f" and the {other} has no stop id: no text of the mixture would end.",
                f"Set eos_token_id in the generation_config.json of the {other}.",
            )

    def require_listed(self, top_logprobs: int) -> None:
        """Refuses to report more candidates than the servers list.

        Raises:
            InvalidRequest: says how many they list.
        """
        if self.max_logprobs is not None and top_logprobs > self.max_logprobs:
            raise InvalidRequest(
                f"top_logprobs is {top_logprobs}, but the servers list {self.max_logprobs} log-probabilities.",
                f"Start them with --max-logprobs {top_logprobs}, or lower top_logprobs.",
            )

    def outcomes(self, params: SamplingParams) -> Outcomes:
        """The alphabet of a request; requests that ask for the same share one.

        Raises:
            InvalidRequest: ids outside the vocabulary, or a stop id of the base where it has none.
        """
        ids = params.special_token_ids, params.stop_token_ids
        return self._cached(
            *ids,
            exclude_special_tokens=params.exclude_special_tokens,
            ignore_eos=params.ignore_eos,
            merge_stop_ids=params.merge_stop_ids,
            stop_id=params.stop_id,
        )

    def _make_outcomes(
        self,
        special_token_ids: tuple[int, ...],
        stop_token_ids: tuple[int, ...],
        *,
        exclude_special_tokens: bool,
        ignore_eos: bool,
        merge_stop_ids: bool,
        stop_id: StopId,
    ) -> Outcomes:
        size = self.alignment.size
        has_own = any(i < self.base.logit_size for i in self.base.stop_ids)
        if stop_id == "base" and self.stop_ids and not has_own and not ignore_eos:
            raise InvalidRequest(
                "stop_id is 'base', and the base has no stop id.",
                "Set eos_token_id in its generation_config.json, or use stop_id 'teacher'.",
            )
        for name, ids in (
            ("special_token_ids", special_token_ids),
            ("stop_token_ids", stop_token_ids),
        ):
            if beyond := [i for i in ids if not 0 <= i < size]:
                raise InvalidRequest(f"{name} holds {beyond[0]}.", f"Ids run from 0 to {size - 1}.")

        masked = {*self.alignment.masked_ids, *special_token_ids}
        if exclude_special_tokens:
            masked |= self.special_ids
        masked -= set(stop_token_ids)

        # Only as a member of the class can an id that one model lacks be drawn.
        stop_ids = self.stop_ids if merge_stop_ids else tuple(i for i in self.stop_ids if i < size)
        if ignore_eos:
            masked, stop_ids = masked | set(stop_ids), ()
        # A differing id that ends a sequence still ends it: it is one outcome, not one token.
        masked -= set(stop_ids)

        own = tuple(i for i in stop_token_ids if i not in stop_ids)
        return Outcomes(tuple(sorted(masked)), stop_ids, merge_stop_ids, own, stop_id)
