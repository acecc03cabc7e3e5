"""The public API: two models sampled as one, by generate, agenerate, stream, astream and score.

Knows signatures, progress and statistics; not how logits are made, nor how results reach the caller.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Sequence,
    Sized,
)
from contextlib import aclosing, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from midlogit.delivery import Batch, Delivery, Event
from midlogit.engines.base import Engine
from midlogit.errors import EngineFailure, Interrupted, InvalidRequest
from midlogit.messages import TemplateOptions
from midlogit.models.mixing import Mixing
from midlogit.openers import Openers
from midlogit.outputs import Completion, Scores, Statistics
from midlogit.params import DEFAULT_PRESET, SamplingParams
from midlogit.requests.build import RequestBuilder, Requests, build_firsts, build_lazily
from midlogit.requests.prompts import Prompt, Reading, pair_up, pair_up_lazily
from midlogit.requests.sequence import Request
from midlogit.requests.sequence import Sequence as Running
from midlogit.updates import Updates

WINDOW = 2  # as many requests as run: those that end are replaced at once


class Pair(Openers, Updates):
    """Two language models sampled as one.

    Open one with `Pair.local`, `Pair.http` or `Pair.vllm`; close it with `close` or a `with` block. All methods may
    be called from any thread, and requests of different calls share the running batch.

    Attributes:
        mixing: what the two models make together: aligned ids, stop ids, masks.
        engine: where the logits come from.
        observer: told of each ended sequence, in the engine's thread; None for nobody.
    """

    def __init__(self, mixing: Mixing, engine: Engine) -> None:
        self.mixing = mixing
        self.engine = engine
        self.observer: Callable[[Running], None] | None = None
        self._process = os.getpid()
        self._statistics = Statistics()
        self._delivery = Delivery(engine, lambda: mixing.teacher.detokenizer, self._count)
        self._abort_unsubmitted = self._delivery.abort_unsubmitted

    def generate(
        self,
        prompts: Sequence[Prompt] | None = None,
        params: SamplingParams | None = None,
        *,
        base_prompts: Sequence[Prompt] | None = None,
        teacher_prompts: Sequence[Prompt] | None = None,
        chat: bool = False,
        chat_template_kwargs: TemplateOptions | None = None,
        add_special_tokens: bool = True,
        request_ids: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Completions of a batch, in the order of the prompts, the n samples of each together.

        Args:
            prompts: text, chat messages or token ids (any sequence or array of integers), the same for both models.
            params: the balanced preset when left out.
            base_prompts, teacher_prompts: for one side each, in place of `prompts`.
            chat: wrap text prompts as one user message in each side's own template.
            chat_template_kwargs: variables of the chat templates, such as {"enable_thinking": False}: one mapping
                for both sides, or one for each of (base, teacher).
            add_special_tokens: encode plain text with what each tokenizer itself adds, such as BOS; a text that
                carries it already gets no second one.
            request_ids: one name per prompt, unique in the call, such as the rows of a data set. With a seed a named
                request draws its own tokens however often its prompt occurs and whatever else the call holds; without
                names, repeated prompts are told apart by their order.
            progress: show a progress bar; by default for more than one completion on a terminal.

        Raises:
            InvalidRequest: before anything runs, for anything that cannot be honoured.
            Interrupted: on Ctrl-C; carries the finished completions and what the others had.
        """
        from tqdm import tqdm

        requests = self.prepare(
            prompts,
            params,
            Reading(chat, chat_template_kwargs, add_special_tokens),
            base_prompts=base_prompts,
            teacher_prompts=teacher_prompts,
            request_ids=request_ids,
        )
        shown = progress if progress is not None else len(requests) > 1 and sys.stderr.isatty()
        found: list[Completion] = []
        batch = Batch(self._delivery, found.append)
        try:
            batch.submit(requests)
            for _ in tqdm(batch, total=len(requests), disable=not shown, unit="completion"):
                pass
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C ends the wait for what was aborted
                batch.stop()
            raise Interrupted(sorted(found, key=_place)) from None
        return sorted(found, key=_place)

    def as_completed(
        self,
        prompts: Iterable[Prompt] | None = None,
        params: SamplingParams | None = None,
        *,
        base_prompts: Iterable[Prompt] | None = None,
        teacher_prompts: Iterable[Prompt] | None = None,
        chat: bool = False,
        chat_template_kwargs: TemplateOptions | None = None,
        add_special_tokens: bool = True,
        request_ids: Iterable[str] | None = None,
        strict: bool = True,
    ) -> Batch:
        """`generate` that yields each completion as soon as it ends, in whatever order they do.

        `index` and `sample` of a completion say which it is. Lists are checked in full before anything runs. Prompts
        without a length, such as those of a generator, are read as completions are delivered, in the caller's thread:
        `start` says how far ahead. Their memory does not grow with their number, except that with a seed and no
        `request_ids` about 100 bytes are kept of each different prompt.

        Args:
            request_ids: as of `generate`; beside prompts without a length, a name that occurs twice is not noticed.
            strict: raise for a prompt that cannot be honoured, the first without a length among them after aborting
                what runs; off, its completions end with finish_reason "error".
        """
        reading = Reading(chat, chat_template_kwargs, add_special_tokens)
        given = [
            column for column in (prompts, base_prompts, teacher_prompts) if column is not None
        ]
        if all(isinstance(column, Sized) for column in given):
            return self.start(
                self.prepare(
                    prompts,
                    params,
                    reading,
                    base_prompts=base_prompts,
                    teacher_prompts=teacher_prompts,
                    request_ids=request_ids,
                    strict=strict,
                )
            )

        self._require_own_process()
        builder = RequestBuilder(self.mixing, _or_default(params), reading, strict=strict)
        pairs = pair_up_lazily(prompts, base_prompts, teacher_prompts)
        return self.start(build_lazily(builder, pairs, request_ids))

    async def agenerate(
        self,
        prompts: Sequence[Prompt] | None = None,
        params: SamplingParams | None = None,
        *,
        base_prompts: Sequence[Prompt] | None = None,
        teacher_prompts: Sequence[Prompt] | None = None,
        chat: bool = False,
        chat_template_kwargs: TemplateOptions | None = None,
        add_special_tokens: bool = True,
        request_ids: Sequence[str] | None = None,
    ) -> list[Completion]:
        """`generate` for asyncio; cancelling the task aborts its requests."""
        # In a thread: it takes a while where a server makes the ids of the prompts.
        requests = await asyncio.to_thread(
            self.prepare,
            prompts,
            params,
            Reading(chat, chat_template_kwargs, add_special_tokens),
            base_prompts=base_prompts,
            teacher_prompts=teacher_prompts,
            request_ids=request_ids,
        )
        async with aclosing(self.run(requests)) as events:
            found = {(c.index, c.sample): c async for c in events if isinstance(c, Completion)}
        return [found[request.index, request.sample] for request in requests]

    def stream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        base_prompt: Prompt | None = None,
        teacher_prompt: Prompt | None = None,
        chat: bool = False,
        chat_template_kwargs: TemplateOptions | None = None,
        add_special_tokens: bool = True,
    ) -> Iterator[Event]:
        """Each token of one completion as it is drawn, then the Completion itself.

        Leaving the loop early aborts the request. The pieces `token.text` joined are `completion.text`.
        """
        reading = Reading(chat, chat_template_kwargs, add_special_tokens)
        return self._delivery.stream(
            self._stream_request(prompt, params, base_prompt, teacher_prompt, reading)
        )

    async def astream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        base_prompt: Prompt | None = None,
        teacher_prompt: Prompt | None = None,
        chat: bool = False,
        chat_template_kwargs: TemplateOptions | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[Event]:
        """`stream` for asyncio."""
        reading = Reading(chat, chat_template_kwargs, add_special_tokens)
        request = await asyncio.to_thread(
            self._stream_request, prompt, params, base_prompt, teacher_prompt, reading
        )
        async with aclosing(self.run([request])) as events:
            async for event in events:
                yield event

    def score(
        self,
        prompts: Sequence[Prompt] | None = None,
        params: SamplingParams | None = None,
        *,
        base_prompts: Sequence[Prompt] | None = None,
        teacher_prompts: Sequence[Prompt] | None = None,
        chat: bool = False,
        chat_template_kwargs: TemplateOptions | None = None,
        add_special_tokens: bool = True,
    ) -> list[Scores]:
        """Scores given texts: log q of each token, given the tokens before it.

        Where the two sides' prompts differ, their common ending is scored, each model after its own prompt. Ctrl-C
        drops the texts that still wait.

        Raises:
            InvalidRequest: before anything runs, for anything that cannot be honoured.
        """
        requests = self.prepare(
            prompts,
            replace(_or_default(params), n=1),
            Reading(chat, chat_template_kwargs, add_special_tokens),
            base_prompts=base_prompts,
            teacher_prompts=teacher_prompts,
            generates=False,
        )
        return self._delivery.scores(requests)

    def prepare(
        self,
        prompts: Iterable[Prompt] | None,
        params: SamplingParams | None,
        reading: Reading,
        *,
        base_prompts: Iterable[Prompt] | None = None,
        teacher_prompts: Iterable[Prompt] | None = None,
        request_ids: Iterable[str] | None = None,
        generates: bool = True,
        stream: bool = False,
        strict: bool = True,
    ) -> Requests:
        """Makes the requests of a call, checked in full; starts nothing.

        Args:
            generates: a token must fit after each prompt; not so where the requests are for `run_scores` alone.
            stream: the listener hears each token.
            strict: raise for a prompt that cannot be honoured; off, the `error` of its requests says why.

        Returns:
            Requests for `start`, `run` and `run_scores`, the n samples of each prompt together.

        Raises:
            InvalidRequest: for anything that cannot be honoured.
            EngineFailure: in a process that was forked after the pair was opened.
        """
        self._require_own_process()
        builder = RequestBuilder(
            self.mixing,
            _or_default(params),
            reading,
            generates=generates,
            stream=stream,
            strict=strict,
        )
        pairs = pair_up(prompts, base_prompts, teacher_prompts)
        return Requests(list(build_firsts(builder, pairs, request_ids)))

    def start(self, requests: Iterable[Request]) -> Batch:
        """Starts prepared requests; without any, an open batch to which they can be submitted.

        Args:
            requests: all run at once, as far as the engine has room. An iterator is read as completions are delivered,
                `WINDOW` times the engine's `max_num_seqs` ahead of them.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """
        batch = Batch(self._delivery)
        if isinstance(requests, Iterator):
            batch.read_from(requests, WINDOW * self.engine.max_num_seqs)
        else:
            batch.submit(requests)
        return batch

    def run(self, requests: Iterable[Request]) -> AsyncGenerator[Event, None]:
        """Runs prepared requests for asyncio; yields the events of all of them as they come.

        `WINDOW` times the engine's `max_num_seqs` of them are with the engine. Leaving early aborts what still runs.
        """
        return self._delivery.events(requests, WINDOW * self.engine.max_num_seqs)

    async def run_scores(self, requests: Sequence[Request]) -> list[Scores]:
        """`score` of the prompts of prepared requests for asyncio; cancelling the task drops those that wait."""
        return await self._delivery.scores_async(requests)

    def statistics(self) -> dict[str, Any]:
        """Counts since the pair was opened.

        Returns:
            The fields of `midlogit.outputs.Statistics`, success_rate, and `speculation`: counts of drafts
            (`midlogit.engines.draft_length.DraftLength.statistics`).
        """
        return {**self._statistics.to_dict(), "speculation": self.engine.draft_length.statistics()}

    def close(self) -> None:
        """Aborts what runs and frees the models; in a process that was forked from the pair's own, does nothing."""
        if os.getpid() == self._process:
            self._abort_unsubmitted()
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stream_request(
        self,
        prompt: Prompt | None,
        params: SamplingParams | None,
        base_prompt: Prompt | None,
        teacher_prompt: Prompt | None,
        reading: Reading,
    ) -> Request:
        if params is not None and params.n > 1:
            raise InvalidRequest(
                f"n is {params.n}.", "A stream is one completion: open one for each."
            )
        one = [None if p is None else [p] for p in (prompt, base_prompt, teacher_prompt)]
        requests = self.prepare(
            one[0], params, reading, base_prompts=one[1], teacher_prompts=one[2], stream=True
        )
        return requests[0]

    def _count(self, sequence: Running) -> None:
        if sequence.completion is not None:
            self._statistics.count(sequence.completion.finish_reason, sequence.decisions)
        if self.observer is not None:
            self.observer(sequence)

    def _require_own_process(self) -> None:
        """Refuses a process that was forked after the pair was opened: the engine's thread is not in it.

        Raises:
            EngineFailure: in such a process.
        """
        if os.getpid() != self._process:
            raise EngineFailure(
                f"This pair was opened in process {self._process}, from which this one was forked.",
                "Open a pair in the child, after the fork.",
            )


def _or_default(params: SamplingParams | None) -> SamplingParams:
    return params or SamplingParams.preset(DEFAULT_PRESET)


def _place(completion: Completion) -> tuple[int, int]:
    """Where a completion stands in the order of its call."""
    return completion.index, completion.sample
