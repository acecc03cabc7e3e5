"""One call of a completion endpoint: runs its requests and orders their events.

Knows requests, rows and streams; a subclass makes the bodies of tokens, endings and whole answers.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from midlogit.errors import MidlogitError
from midlogit.outputs import Completion, Scores, Token
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt, Reading
from midlogit.requests.sequence import Request
from midlogit.server.errors import ApiError, from_midlogit
from midlogit.server.gate import Pass
from midlogit.server.logs import logger, request_id
from midlogit.server.parameters import base_prompts, teacher_prompts
from midlogit.server.pieces import facts_of_completion, facts_of_token, usage_of
from midlogit.server.service import MODEL, Service
from midlogit.server.streaming import DONE, EventStream, event, while_connected
from midlogit.server.wire.requests import Sampling


class Call(ABC):
    """A request body turned into requests of the pair. The constructor reads and checks prompts; `respond` runs them.

    Attributes:
        prompts: one request per prompt. requests: one per completion; none where only the prompts are asked for.
        scores: of the prompts, where they are asked for; filled by `respond`.

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
        self.scores: list[Scores] = []
        self._scores = scores
        self._streams, self._includes_usage = body.stream, body.includes_usage
        self._adds_ids, self._adds_facts = body.return_token_ids, body.midlogit.diagnostics
        self._head = {
            "id": f"{prefix}-{request_id.get()}",
            "created": int(time.time()),
            "model": model,
        }

        service.gate.require_possible(len(prompts) * (body.n if generates else 1))
        requests = service.pair.prepare(
            prompts,
            params,
            reading,
            base_prompts=base_prompts(body.midlogit, len(prompts)),
            teacher_prompts=teacher_prompts(body.midlogit, len(prompts)),
            generates=generates,
            stream=body.stream,
        )
        self.prompts = [request for request in requests if request.sample == 0]
        self.requests = requests if generates else []

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
            ApiError: 429 when the queue is full, 500 when the engine fails.
            ClientGone: the client disconnected.
        """
        entry = self.service.gate.enter(len(self.requests) or len(self.prompts))
        if self._streams:
            return EventStream(self._stream(entry), entry.close)
        try:
            answer = await while_connected(http.receive, self._answer(entry))
        finally:
            entry.close()
        return Response(orjson.dumps(answer), media_type="application/json")

    async def _answer(self, entry: Pass) -> dict[str, Any]:
        await self._score()
        async with aclosing(self.service.run(self.requests, entry)) as events:
            found = [
                _unbroken(happened) async for happened in events if isinstance(happened, Completion)
            ]

        found.sort(key=self._index)
        if self.requests:
            choices = [self.choice(completion, index) for index, completion in enumerate(found)]
        else:
            choices = [
                c
                for index in range(len(self.prompts) * self.n)
                if (c := self.opening(index)) is not None
            ]
        tokens = sum(len(completion.token_ids) for completion in found)
        return {
            **self._head,
            **self.frame(choices, chunk=False),
            "usage": usage_of(self.prompts, tokens),
        }

    async def _stream(self, entry: Pass) -> AsyncGenerator[bytes, None]:
        """The answer as Server-Sent Events; an error in the middle is an event, too."""
        try:
            async with aclosing(self._chunks(entry)) as chunks:
                async for data in chunks:
                    yield event(data)
        except (ApiError, MidlogitError) as error:
            told = error if isinstance(error, ApiError) else from_midlogit(error)
            self.service.metrics.failed(told.code)
            logger.error("a stream broke off: %s", error)
            yield event(told.body)
        yield DONE

    async def _chunks(self, entry: Pass) -> AsyncGenerator[dict[str, Any], None]:
        await self._score()
        for index in range(len(self.prompts) * self.n):
            if (choice := self.opening(index)) is not None:
                yield self._chunk([choice])

        sent: dict[int, int] = {}
        tokens = 0
        async with aclosing(self.service.run(self.requests, entry)) as events:
            async for happened in events:
                index = self._index(happened)
                if isinstance(happened, Completion):
                    rest = _unbroken(happened).text[sent.get(index, 0) :]
                    yield self._chunk([self.ending(happened, index, rest)])
                    continue

                tokens += 1
                sent[index] = sent.get(index, 0) + len(happened.text)
                if (choice := self.delta(happened, index)) is not None:
                    yield self._chunk([choice])

        if self._includes_usage:
            yield {**self._chunk([]), "usage": usage_of(self.prompts, tokens)}

    async def _score(self) -> None:
        if self._scores is not None:
            params = replace(self.prompts[0].params, top_logprobs=self._scores)
            texts = [replace(prompt, params=params) for prompt in self.prompts]
            self.scores = await self.service.score(texts)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._includes_usage else {}
        return {**self._head, **self.frame(choices, chunk=True), **usage}

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
    """Adds which weights of the base drew which tokens, once they have changed."""
    if completion.weight_versions:
        choice["weight_versions"] = [span._asdict() for span in completion.weight_versions]


def _unbroken(completion: Completion) -> Completion:
    """The completion.

    Raises:
        ApiError: 500 when it ended in an error.
    """
    if completion.finish_reason == "error":
        logger.error("a completion failed: %s", completion.error)
        raise ApiError(500, "engine_failure", "The engine failed; the server's log says how.")
    return completion
