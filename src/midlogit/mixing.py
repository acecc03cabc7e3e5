"""What two checkpoints make together: aligned ids, merged stop ids, masks, the alphabet of each request.

Knows both tokenizers and the request's parameters; runs no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from midlogit.checkpoint import Model
from midlogit.core.alignment import Alignment, align, require_mixable
from midlogit.core.outcomes import Outcomes
from midlogit.errors import InvalidRequest
from midlogit.params import SamplingParams

KEPT_OUTCOMES = 64  # alphabets kept for later requests; whoever asks for ever new ones must not fill the memory


@dataclass(frozen=True)
class Mixing:
    """Two checkpoints that are to be mixed."""

    base: Model
    teacher: Model
    _outcomes: dict[object, Outcomes] = field(default_factory=dict, repr=False)

    @cached_property
    def alignment(self) -> Alignment:
        base, teacher = self.base, self.teacher
        if base.vocabulary is None or teacher.vocabulary is None:
            return Alignment.taken_for_granted(min(base.logit_size, teacher.logit_size))
        return align(base.vocabulary, teacher.vocabulary, base.logit_size, teacher.logit_size)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Stop ids of either model, the teacher's first."""
        usable = range(self.alignment.size)
        ids = [*self.teacher.stop_ids, *self.base.stop_ids]
        return tuple(dict.fromkeys(i for i in ids if i in usable))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Special ids of either tokenizer that end no sequence."""
        return (self.base.special_ids | self.teacher.special_ids) - set(self.stop_ids)

    def require_mixable(self) -> None:
        """Raises PairMismatch when the tokenizers disagree."""
        require_mixable(self.alignment)

    def outcomes(self, params: SamplingParams) -> Outcomes:
        """The alphabet of a request; requests that ask for the same share one.

        Raises:
            InvalidRequest: ids outside the vocabulary.
        """
        key = (
            params.exclude_special_tokens, params.special_token_ids, params.stop_token_ids,
            params.ignore_eos, params.merge_stop_ids,
        )  # fmt: skip
        if key not in self._outcomes:
            while len(self._outcomes) >= KEPT_OUTCOMES:
                del self._outcomes[next(iter(self._outcomes))]
            for name in ("special_token_ids", "stop_token_ids"):
                beyond = [i for i in getattr(params, name) if not 0 <= i < self.alignment.size]
                if beyond:
                    raise InvalidRequest(f"{name} holds {beyond[0]}.", f"Ids run from 0 to {self.alignment.size - 1}.")
            masked = {*self.alignment.masked_ids, *params.special_token_ids}
            if params.exclude_special_tokens:
                masked |= self.special_ids
            masked -= set(params.stop_token_ids)
            stop_ids = self.stop_ids
            if params.ignore_eos:
                masked, stop_ids = masked | set(stop_ids), ()
            # A differing id that ends a sequence still ends it: it is one outcome, not one token.
            masked -= set(stop_ids)
            own = tuple(i for i in params.stop_token_ids if i not in stop_ids)
            self._outcomes[key] = Outcomes(tuple(sorted(masked)), stop_ids, params.merge_stop_ids, own)
        return self._outcomes[key]
