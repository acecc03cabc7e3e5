"""Builds the requests of a call from its prompts and parameters, checked in full; runs nothing."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from midlogit.core.uniforms import identity
from midlogit.errors import InvalidRequest
from midlogit.models.mixing import Mixing
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt, Reader, Reading, readers, require_chat
from midlogit.requests.sequence import Request


def build_requests(
    mixing: Mixing,
    pairs: Sequence[tuple[Prompt, Prompt]],
    params: SamplingParams,
    reading: Reading,
    *,
    generates: bool,
    stream: bool,
    request_ids: Sequence[str] | None,
    strict: bool,
) -> list[Request]:
    """The requests of a call, in the order of the prompts, the n samples of each together.

    Args:
        pairs: (base prompt, teacher prompt).
        generates: a token must fit after each prompt.
        request_ids: a name per prompt, None where the order of equal prompts tells them apart.
        strict: raise for a prompt that cannot be honoured; off, the `error` of its requests says why.

    Raises:
        InvalidRequest: for anything that cannot be honoured.
    """
    outcomes = mixing.outcomes(params)
    base, teacher = mixing.base, mixing.teacher
    names = _names(request_ids, len(pairs))
    both = readers((base, teacher), reading, min_new_tokens=int(generates))
    require_chat(both, pairs)

    repetitions: Counter[bytes] = Counter()
    requests = []
    for index, (base_prompt, prompt) in enumerate(pairs):
        base_ids, teacher_ids, refused = _read(both, base_prompt, prompt, index, strict=strict)
        own = identity(base_ids, teacher_ids, names[index])
        first = params.n * repetitions[own]
        repetitions[own] += 1

        request = Request(
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
            outcomes=outcomes,
            stream=stream,
            error=refused,
        )
        requests += [replace(request, sample=n, repetition=first + n) for n in range(params.n)]
    return requests


def _read(
    both: tuple[Reader, Reader], base_prompt: Prompt, prompt: Prompt, index: int, *, strict: bool
) -> tuple[tuple[int, ...], tuple[int, ...], str | None]:
    """Reads the prompts of one request: ids of base and teacher, and why they cannot be honoured, unless `strict`."""
    number = index if strict else None
    try:
        return tuple(both[0].read(base_prompt, number)), tuple(both[1].read(prompt, number)), None
    except InvalidRequest as error:
        if strict:
            raise
        return (), (), str(error)


def _names(request_ids: Sequence[str] | None, prompts: int) -> Sequence[str | None]:
    """The name of each prompt's request, None where the caller gave none.

    Raises:
        InvalidRequest: not one name per prompt, or a name that occurs twice.
    """
    if request_ids is None:
        return [None] * prompts
    if isinstance(request_ids, str) or len(request_ids) != prompts:
        raise InvalidRequest("request_ids and prompts differ in number.", "Give one id per prompt.")
    for name, count in Counter(request_ids).items():
        if not isinstance(name, str):
            raise InvalidRequest(f"request_ids holds {name!r}, which is no text.", "Give strings.")
        if count > 1:
            raise InvalidRequest(
                f"request_ids holds {name!r} {count} times.", "Give each request its own."
            )
    return list(request_ids)
