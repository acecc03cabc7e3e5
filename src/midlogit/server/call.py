"""One call of a completion endpoint: runs its requests and orders their events.

Knows requests, rows and streams; a subclass makes the bodies of tokens, endings and whole answers.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from midlogit.errors import MidlogitError
from midlogit.models.mixing import Mixing
from midlogit.outputs import Completion, Scores, Token
from midlogit.params import SamplingParams
from midlogit.requests.build import RequestBuilder, Requests, build_firsts
from midlogit.requests.prompts import Prompt, Reading, pair_up
from midlogit.requests.sequence import Request
from midlogit.server.errors import ApiError, from_midlogit
from midlogit.server.gate import Pass
from midlogit.server.lanes import LONG_BODY
from midlogit.server.logs import logger, request_id
from midlogit.server.parameters import base_prompts, teacher_prompts
from midlogit.server.pieces import facts_of_completion, facts_of_token, usage_of
from midlogit.server.service import MODEL, Service
from midlogit.server.streaming import DONE, EventStream, JsonParts, event, while_connected
from midlogit.server.wire.requests import Sampling
from midlogit.server.wire.responses import Usage

SCORED = 2**17  # candidates of prompts that are held at once, while nothing is generated
# Log-probabilities of candidates and ids of prompts in an answer; 16 times as many for a trainer.
MOST_ENTRIES = 2**22
MOST_SUPPORT = 2**24  # ids of the supports of an answer, shared out to its completions


async def respond(
    http: HttpRequest, service: Service, body: Sampling, call: Callable[[], Call]
) -> Response:
    """Makes the call of a body and runs it.

    Raises:
        ApiError, MidlogitError, ClientGone: as `Call` and `Call.respond`.
    """
    made = call() if body.size <= LONG_BODY else await service.lanes.check(call)
    return await made.respond(http)


def prepared(
    mixing: Mixing,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    reading: Reading,
    *,
    base_prompts: Sequence[Prompt] | None,
    teacher_prompts: Sequence[Prompt] | None,
    generates: bool,
    stream: bool,
) -> Iterator[Request]:
    """The first request of each prompt, as it is asked for; nothing is done before."""
    builder = RequestBuilder(mixing, params, reading, generates=generates, stream=stream)
    yield from build_firsts(builder, pair_up(prompts, base_prompts, teacher_prompts), None)


class Call(ABC):
    """A request body turned into requests of the pair. The constructor checks counts; `respond` reads the prompts.

    Attributes:
        prompts: one request per prompt, once they are read. requests: one per completion; none where only the prompts
            are asked for.
        scores: of the prompts whose choices are made now, by index, where they are asked for.

    Args:
        scores: candidates for each token of the prompts; None where no prompt is to be scored.
        model: its name in the answer.

    Raises:
        MidlogitError: something cannot be honoured.
    """

    def __init__(
        self,
        service: Service,
        body: Sampling,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        prefix: str,
        reading: Reading,
        generates: bool = True,
        scores: int | None = None,
        model: str = MODEL,
    ) -> None:
        self.service = service
        self.n = body.n
        self.scores: dict[int, Scores] = {}
        self._scores = scores
        self._streams, self._includes_usage = body.stream, body.includes_usage
        self._adds_ids, self._adds_facts = body.return_token_ids, body.midlogit.diagnostics
        self._head = {
            "id": f"{prefix}-{request_id.get()}",
            "created": int(time.time()),
            "model": model,
        }

        service.gate.require_possible(len(prompts) * body.n)
        self._rows = len(prompts) * (body.n if generates else 1)
        self._generates, self._size = generates, body.size
        self._preparing = partial(
            prepared,
            service.pair.mixing,
            prompts,
            params,
            reading,
            base_prompts=base_prompts(body.midlogit, len(prompts)),
            teacher_prompts=teacher_prompts(body.midlogit, len(prompts)),
            generates=generates,
            stream=body.stream,
        )
        self.prompts: list[Request] = []
        self.requests: Sequence[Request] = ()

    @abstractmethod
    def delta(self, token: Token, index: int) -> dict[str, Any] | None:
        """The stream's choice for one token; None when it has neither text nor data yet."""

    @abstractmethod
    def ending(self, completion: Completion, index: int, rest: str) -> dict[str, Any]:
        """The stream's choice at the end of a completion; `rest` is text that no token carried."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The stream's choice before the first token of a completion; None for none."""

    @abstractmethod
    def choice(self, completion: Completion, index: int) -> dict[str, Any]:
        """The choice of a completion in an answer that is not streamed."""

    @abstractmethod
    def frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """The body around choices, without id, creation time, model and usage."""

    async def respond(self, http: HttpRequest) -> Response:
        """Runs the call and makes the response.

        Raises:
            ApiError: 400 for an answer that would be too large, 429 when the queue is full, 500 when the engine fails.
            MidlogitError: a prompt cannot be honoured.
            ClientGone: the client disconnected.
        """
        entry = self.service.gate.enter(self._rows)
        try:
            await while_connected(http.receive, self._prepare())
            if self._streams:
                chunks = self._stream(entry)
                return EventStream(chunks, entry.close)
            answer = await while_connected(http.receive, self._answer(entry))
        except BaseException:
            entry.close()
            raise
        entry.close()
        return answer

    async def _prepare(self) -> None:
        """Reads the prompts, in turns with other requests."""
        self.prompts = await self.service.lanes.read_all(self._preparing(), self._size)
        if self._generates:
            most = MOST_SUPPORT // self._rows
            self.prompts = [replace(prompt, most_support=most) for prompt in self.prompts]
            self.requests = Requests(self.prompts)
        self._require_answerable()

    def _require_answerable(self) -> None:
        """Refuses a call whose answer could be too large.

        Raises:
            ApiError: 400.
        """
        entries = 0
        for prompt in self.prompts:
            tokens = min(prompt.params.max_tokens, prompt.max_new_tokens) if self._generates else 0
            entries += self.n * tokens * prompt.params.top_logprobs
            if self.shows_prompts:
                entries += self.n * len(prompt.teacher_ids) * (1 + (self._scores or 0))
        most = MOST_ENTRIES * (16 if self.service.settings.train else 1)
        if entries > most:
            raise ApiError(
                400,
                "answer_too_large",
                f"The answer could have {entries} log-probabilities and prompt ids; it may have {most}.",
                "Split the request, or ask for fewer candidates, completions or tokens.",
            )

    async def _answer(self, entry: Pass) -> Response:
        """The whole answer; each choice becomes bytes as soon as it is known."""
        compute = self.service.lanes.compute
        choices: dict[int, bytes] = {}
        tokens = 0
        if not self.requests:
            async with aclosing(self._openings()) as indices:
                async for index in indices:
                    choices[index] = await compute(partial(_json_of, self.opening, index))
        else:
            await self._score(self.prompts)

        async with aclosing(self.service.run(self.requests, entry)) as events:
            async for happened in events:
                if isinstance(happened, Completion):
                    index = self._index(happened)
                    tokens += len(happened.token_ids)
                    completion = _unbroken(happened)
                    choices[index] = await compute(
                        partial(_json_of, self.choice, completion, index)
                    )

        frame = await compute(partial(_json_of, self._whole_frame, tokens))
        head, separator, tail = frame.partition(b'"choices":[')
        return JsonParts(head + separator, [choices[i] for i in sorted(choices)], tail)

    def _whole_frame(self, tokens: int) -> dict[str, Any]:
        return {**self._head, **self.frame([], chunk=False), "usage": self._usage(tokens)}

    async def _stream(self, entry: Pass) -> AsyncGenerator[bytes, None]:
        """The answer as Server-Sent Events; an error in the middle is an event, too."""
        try:
            async with aclosing(self._chunks(entry)) as chunks:
                async for data in chunks:
                    yield data
        except (ApiError, MidlogitError) as error:
            problem = error if isinstance(error, ApiError) else from_midlogit(error)
            self.service.metrics.failed(problem.code)
            logger.error("a stream broke off: %s", error)
            yield event(problem.told(self.service.redact))
        yield DONE

    async def _chunks(self, entry: Pass) -> AsyncGenerator[bytes, None]:
        compute = self.service.lanes.compute
        async with aclosing(self._openings()) as indices:
            async for index in indices:
                if opening := await compute(partial(self._opening_chunk, index)):
                    yield opening

        sent: dict[int, int] = {}
        tokens = 0
        async with aclosing(self.service.run(self.requests, entry)) as events:
            async for happened in events:
                index = self._index(happened)
                if isinstance(happened, Completion):
                    rest = _unbroken(happened).text[sent.pop(index, 0) :]
                    yield self._chunk([self.ending(happened, index, rest)])
                    continue

                tokens += 1
                sent[index] = sent.get(index, 0) + len(happened.text)
                if (choice := self.delta(happened, index)) is not None:
                    yield self._chunk([choice])

        if self._includes_usage:
            yield self._chunk([], usage=self._usage(tokens))

    def _opening_chunk(self, index: int) -> bytes | None:
        choice = self.opening(index)
        return None if choice is None else self._chunk([choice])

    async def _openings(self) -> AsyncGenerator[int, None]:
        """Scores the prompts bit by bit, where that is asked for; yields each choice that can be opened."""
        for prompts in self._windows():
            await self._score(prompts)
            for prompt in prompts:
                for sample in range(self.n):
                    yield prompt.index * self.n + sample

    def _windows(self) -> Iterator[list[Request]]:
        """The prompts, as many together as have few candidates."""
        window: list[Request] = []
        entries = 0
        for prompt in self.prompts:
            window.append(prompt)
            entries += len(prompt.teacher_ids) * (1 + (self._scores or 0))
            if entries >= SCORED:
                yield window
                window, entries = [], 0
        yield window

    async def _score(self, prompts: list[Request]) -> None:
        if self._scores is None or not prompts:
            return
        params = replace(prompts[0].params, top_logprobs=self._scores)
        found = await self.service.score([replace(prompt, params=params) for prompt in prompts])
        self.scores = {prompt.index: scores for prompt, scores in zip(prompts, found, strict=True)}

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        told = {"usage": usage} if self._includes_usage else {}
        return event({**self._head, **self.frame(choices, chunk=True), **told})

    def _usage(self, tokens: int) -> Usage:
        return usage_of(self.prompts, tokens)

    @property
    def shows_prompts(self) -> bool:
        """Whether choices have the ids, the text or the scores of their prompts."""
        return self._adds_ids or self._scores is not None

    def _add_token_data(self, choice: dict[str, Any], token: Token) -> None:
        """Adds the id and the diagnostics of a stream's token, where the body asks for them."""
        if self._adds_ids:
            choice["token_ids"] = [token.token_id]
        if self._adds_facts:
            choice["midlogit"] = facts_of_token(token, self.service.vocabulary)

    def _add_completion_data(
        self, choice: dict[str, Any], completion: Completion, index: int
    ) -> None:
        """Adds the weights' versions of a whole choice, and its ids and diagnostics where the body asks for them."""
        if self._adds_ids:
            choice["token_ids"] = completion.token_ids
        add_versions(choice, completion)
        if self._adds_facts:
            facts = facts_of_completion(completion, self.service.vocabulary)
            choice["midlogit"] = choice.get("midlogit", {}) | facts
            if self._adds_ids:
                prompt = self.prompt_of(index)
                choice["midlogit"]["base_prompt_token_ids"] = list(prompt.base_ids)
                choice["midlogit"]["teacher_prompt_token_ids"] = list(prompt.teacher_ids)

    def _index(self, happened: Token | Completion) -> int:
        return happened.index * self.n + happened.sample

    def prompt_of(self, index: int) -> Request:
        """The prompt of choice number `index`."""
        return self.prompts[index // self.n]

    def prompt_ids(self, request: Request) -> list[int]:
        """The ids that answers call the prompt's: the teacher's, for a trainer the base's."""
        return list(request.base_ids if self.service.settings.train else request.teacher_ids)


def add_versions(choice: dict[str, Any], completion: Completion) -> None:
    """Adds which weights of the base drew which tokens, once they have changed, and changes that nobody told of."""
    if completion.weight_versions:
        choice["weight_versions"] = [span._asdict() for span in completion.weight_versions]
    if completion.weights_changed:
        choice["weights_changed"] = completion.weights_changed


def _unbroken(completion: Completion) -> Completion:
    """The completion.

    Raises:
        ApiError: 500 when it ended in an error.
    """
    if completion.finish_reason == "error":
        logger.error("a completion failed: %s", completion.error)
        raise ApiError(500, "engine_failure", "The engine failed; the server's log says how.")
    return completion


def _json_of(make: Callable[..., Any], *arguments: Any) -> bytes:
    return orjson.dumps(make(*arguments))
