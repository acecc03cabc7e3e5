"""Builds requests from prompts and parameters: prompt by prompt, each of its samples as it is needed; runs nothing."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import overload

from midlogit.core.uniforms import identity
from midlogit.errors import InvalidRequest
from midlogit.models.mixing import Mixing
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt, Reader, Reading, readers, require_chat, zip_equal
from midlogit.requests.sequence import Request

KEY_BYTES = 8  # of an identity that tell prompts apart where repeated ones are counted
MOST_COMPLETIONS = 2**20  # of one call that keeps all of them


class Requests(Sequence[Request]):
    """The requests of a call, in the order of the prompts, the n samples of each together.

    Only the first of each prompt is kept; the others are made as they are asked for.

    Attributes:
        firsts: the first request of each prompt.
    """

    def __init__(self, firsts: list[Request]) -> None:
        self.firsts = firsts
        self._n = firsts[0].params.n if firsts else 1

    def __len__(self) -> int:
        return len(self.firsts) * self._n

    @overload
    def __getitem__(self, at: int) -> Request: ...
    @overload
    def __getitem__(self, at: slice) -> list[Request]: ...
    def __getitem__(self, at: int | slice) -> Request | list[Request]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        prompt, sample = divmod(range(len(self))[at], self._n)
        return sample_of(self.firsts[prompt], sample)


def sample_of(first: Request, sample: int) -> Request:
    """A further one of the n samples of a prompt, whose first is given."""
    return replace(first, sample=sample, repetition=first.repetition + sample)


class RequestBuilder:
    """Builds the requests of a call, prompt by prompt.

    With a seed and without names it counts how often each prompt occurs, which takes about 100 bytes for each different
    one; otherwise it keeps nothing of a prompt.

    Args:
        generates: a token must fit after each prompt.
        stream: the listener hears each token.
        strict: raise for a prompt that cannot be honoured; off, the `error` of its requests says why.

    Raises:
        InvalidRequest: parameters or template variables that cannot be honoured.
    """

    def __init__(
        self,
        mixing: Mixing,
        params: SamplingParams,
        reading: Reading,
        *,
        generates: bool = True,
        stream: bool = False,
        strict: bool = True,
    ) -> None:
        self._mixing, self._params = mixing, params
        mixing.require_listed(params.top_logprobs)
        self._outcomes = mixing.outcomes(params)
        self._readers = readers(
            (mixing.base, mixing.teacher), reading, min_new_tokens=int(generates)
        )
        self._stream, self._strict = stream, strict
        self._repetitions: Counter[bytes] = Counter()
        self._latest: dict[str, tuple[Prompt, tuple[int, ...]]] = {}  # what each side read last

    @property
    def n(self) -> int:
        """Completions of each prompt."""
        return self._params.n

    def require_chat(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> None:
        """Refuses template variables that none of these prompts would get.

        Raises:
            InvalidRequest: there are some, and no prompt of their side goes through a template.
        """
        require_chat(self._readers, pairs)

    def build(
        self, index: int, base_prompt: Prompt, prompt: Prompt, name: str | None = None
    ) -> Iterator[Request]:
        """The n requests of a prompt.

        Args and errors are those of `first`.
        """
        first = self.first(index, base_prompt, prompt, name)
        return (sample_of(first, sample) for sample in range(first.params.n))

    def first(
        self, index: int, base_prompt: Prompt, prompt: Prompt, name: str | None = None
    ) -> Request:
        """The first of the n requests of a prompt.

        Args:
            index: of the prompt in its call. name: of the request; None where the order of equal prompts tells them
                apart.

        Raises:
            InvalidRequest: the prompt cannot be honoured, if strict.
        """
        params, base, teacher = self._params, self._mixing.base, self._mixing.teacher
        base_ids, teacher_ids, refused = self._read(base_prompt, prompt, index)
        own = identity(base_ids, teacher_ids, name)
        first = 0
        if params.seed is not None and name is None:
            first = params.n * self._repetitions[own[:KEY_BYTES]]
            self._repetitions[own[:KEY_BYTES]] += 1

        return Request(
            index=index,
            sample=0,
            prompt=prompt,
            base_prompt=base_prompt,
            base_ids=base_ids,
            teacher_ids=teacher_ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            identity=own,
            repetition=first,
            max_new_tokens=min(
                base.max_context - len(base_ids), teacher.max_context - len(teacher_ids)
            ),
            outcomes=self._outcomes,
            stream=self._stream,
            error=refused,
        )

    def _read(
        self, base_prompt: Prompt, prompt: Prompt, index: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], str | None]:
        """Ids of base and teacher, and why they cannot be honoured, unless strict."""
        base, teacher = self._readers
        number = index if self._strict else None
        try:
            base_ids = self._ids(base, base_prompt, number)
            return base_ids, self._ids(teacher, prompt, number), None
        except InvalidRequest as error:
            if self._strict:
                raise
            return (), (), str(error)

    def _ids(self, reader: Reader, prompt: Prompt, number: int | None) -> tuple[int, ...]:
        """Ids of a prompt; a text or tuple that several requests share is read once."""
        latest, ids = self._latest.get(reader.side, (None, ()))
        if prompt is not latest or not isinstance(prompt, str | tuple):
            ids = tuple(reader.read(prompt, number))
            self._latest[reader.side] = prompt, ids
        return ids


def build_firsts(
    builder: RequestBuilder,
    pairs: Sequence[tuple[Prompt, Prompt]],
    request_ids: Iterable[str] | None,
) -> Iterator[Request]:
    """The first request of each prompt of a call, as it is asked for.

    Args:
        pairs: (base prompt, teacher prompt).
        request_ids: a name per prompt, None where the order of equal prompts tells them apart.

    Raises:
        InvalidRequest: for anything that cannot be honoured; for a prompt, when its request is asked for.
    """
    completions = len(pairs) * builder.n
    if completions > MOST_COMPLETIONS:
        raise InvalidRequest(
            f"The call asks for {completions} completions, and one call makes at most {MOST_COMPLETIONS}.",
            "Give as_completed an iterator of prompts, or run a batch job.",
        )
    names = _names(request_ids, len(pairs))
    builder.require_chat(pairs)
    return (
        builder.first(index, *pair, name)
        for index, (pair, name) in enumerate(zip(pairs, names, strict=True))
    )


def build_lazily(
    builder: RequestBuilder,
    pairs: Iterable[tuple[Prompt, Prompt]],
    request_ids: Iterable[str] | None,
) -> Iterator[Request]:
    """The requests of prompts that are read as the requests are asked for, and not kept.

    The first prompt decides whether template variables are of use, and a name that occurs twice is not noticed.

    Raises:
        InvalidRequest: at the prompt that cannot be honoured; or there is none, or not one name per prompt.
    """
    if isinstance(request_ids, str):
        raise InvalidRequest("request_ids is one text.", "Give one id per prompt.")
    index = -1
    columns = (pairs,) if request_ids is None else (pairs, request_ids)
    for index, (pair, *names) in enumerate(zip_equal("prompts and request_ids", *columns)):
        if not index:
            builder.require_chat([pair])
        for name in names:
            _require_text(name)
        yield from builder.build(index, *pair, *names)

    if index < 0:
        raise InvalidRequest("There are no prompts.", "Give at least one.")


def _names(request_ids: Iterable[str] | None, prompts: int) -> Sequence[str | None]:
    """The name of each prompt's request, None where the caller gave none.

    Raises:
        InvalidRequest: not one name per prompt, or a name that occurs twice.
    """
    if request_ids is None:
        return [None] * prompts
    names = [] if isinstance(request_ids, str) else list(request_ids)
    if len(names) != prompts:
        raise InvalidRequest("request_ids and prompts differ in number.", "Give one id per prompt.")
    for name, count in Counter(names).items():
        _require_text(name)
        if count > 1:
            raise InvalidRequest(
                f"request_ids holds {name!r:.80} {count} times.", "Give each request its own."
            )
    return names


def _require_text(name: object) -> None:
    if not isinstance(name, str):
        raise InvalidRequest(f"request_ids holds {name!r:.80}, which is no text.", "Give strings.")
