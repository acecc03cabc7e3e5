"""Builds the requests of a call from its prompts and parameters, checked in full; runs nothing."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence

from midlogit.core.uniforms import identity
from midlogit.errors import InvalidRequest
from midlogit.models.mixing import Mixing
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt, Reading, readers, require_chat
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

    places: Counter[bytes] = Counter()
    requests = []
    for index, (base_prompt, prompt) in enumerate(pairs):
        base_ids, teacher_ids, refused = [], [], None
        number = index if strict else None
        try:
            base_ids, teacher_ids = both[0].read(base_prompt, number), both[1].read(prompt, number)
        except InvalidRequest as error:
            if strict:
                raise
            refused = str(error)

        seed = secrets.randbits(63) if params.seed is None else params.seed
        own = identity(base_ids, teacher_ids, names[index])
        first = params.n * places[own]
        places[own] += 1
        requests += [
            Request(
                index=index,
                sample=sample,
                prompt=prompt,
                base_prompt=base_prompt,
                base_ids=tuple(base_ids),
                teacher_ids=tuple(teacher_ids),
                params=params,
                seed=seed,
                identity=own,
                repetition=first + sample,
                max_new_tokens=min(base.max_context - len(base_ids), teacher.max_context - len(teacher_ids)),
                outcomes=outcomes,
                stream=stream,
                error=refused,
            )
            for sample in range(params.n)
        ]
    return requests


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
            raise InvalidRequest(f"request_ids holds {name!r} {count} times.", "Give each request its own.")
    return list(request_ids)
