"""The front door: opens an engine over two models and offers generate, agenerate, stream and astream.

Knows prompts, parameters, statistics and progress; not how logits are made.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from midlogit.delivery import Batch, Event, wait_for
from midlogit.engines.base import Engine
from midlogit.engines.draft_length import SpeculationOption
from midlogit.errors import EngineFailure, Interrupted, InvalidRequest
from midlogit.messages import TemplateOptions
from midlogit.models.checkpoint import TemplateNames, names_of_sides
from midlogit.models.mixing import Mixing
from midlogit.outputs import Completion, Scores, Statistics
from midlogit.params import DEFAULT_PRESET, SamplingParams
from midlogit.requests.build import build_requests
from midlogit.requests.prompts import Prompt, Reading, pair_up
from midlogit.requests.scoring import Scored, ScoreRequest
from midlogit.requests.sequence import Request
from midlogit.requests.sequence import Sequence as Running

_T = TypeVar("_T")


class Pair:
    """Two language models sampled as one.

    Open one with `Pair.local`, `Pair.http` or `Pair.vllm`; close it with `close` or a `with` block. All methods may
    be called from any thread, and requests of different calls share the running batch.
    """

    def __init__(self, mixing: Mixing, engine: Engine) -> None:
        self.mixing = mixing
        self._engine = engine
        self._process = os.getpid()
        self._statistics = Statistics()
        self.observer: Callable[[Running], None] | None = None  # told of each ended sequence, in the engine's thread

    @classmethod
    def local(
        cls,
        base: str | Path | None = None,
        teacher: str | Path | None = None,
        *,
        device: str | tuple[str, str] = "auto",
        dtype: str = "auto",
        max_num_seqs: int = 16,
        speculation: SpeculationOption = "auto",
        chat_template: TemplateNames = None,
    ) -> Self:
        """Two transformers models in this process; without names the bundled pair.

        Args:
            base, teacher: Hugging Face model folders or hub ids; may be the same.
            device: "auto", "cpu", "cuda", "cuda:1", or one for each of (base, teacher).
            dtype: "auto" (float32 on the CPU, else bfloat16), "float32", "float64", "bfloat16", "float16".
            max_num_seqs: most sequences that run at once; more wait.
            speculation: tokens that the base drafts ahead for the teacher to check at once; "auto" chooses as
                many as measured times say pay. It changes the speed, never the tokens (docs/speculation.md).
            chat_template: which of a tokenizer's named chat templates to use: a name, or one for each of
                (base, teacher); by default the only one, or the one named "default".

        Raises:
            ModelUnavailable: a model that is not there or not a causal LM.
            PairMismatch: tokenizers that disagree.
            InvalidRequest: an unknown device, dtype or chat template, a speculation out of range, or only one of the
                models named.
            MissingExtra: torch or transformers is not installed.
        """
        from midlogit.engines.local.opening import open_pair

        mixing, engine = open_pair(
            base,
            teacher,
            device=device,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            speculation=speculation,
            chat_template=chat_template,
        )
        return cls(mixing, engine)

    @classmethod
    def http(
        cls,
        base: str | Sequence[str],
        teacher: str | Sequence[str],
        *,
        top_k: int | Literal["auto"] = 20,
        tolerance: float = 0.05,
        speculation: SpeculationOption = "auto",
        base_model: str | None = None,
        teacher_model: str | None = None,
        base_tokenizer: str | Path | None = None,
        teacher_tokenizer: str | Path | None = None,
        chat_template: TemplateNames = None,
        base_api_key: str | None = None,
        teacher_api_key: str | None = None,
        connection_pool_size: int = 100,
        max_retries: int = 3,
        timeout: float = 120.0,
    ) -> Self:
        """Two vLLM servers; everything that makes them unusable is raised here, before anything is generated.

        Args:
            base, teacher: the server's OpenAI URL, ending in /v1; several for replicas of one model.
            top_k: log-probabilities to ask of each side, or "auto" to ask for more where the certified bound
                on the total variation exceeds `tolerance`.
            speculation: tokens that the base's server drafts ahead for the teacher's to check in one call; "auto"
                chooses as many as measured times say pay, and drafts none for requests that give a seed: over
                HTTP the tokens at a seed depend on the number, their distribution does not (docs/speculation.md).
            base_model, teacher_model: the name served there; by default the server's first.
            base_tokenizer, teacher_tokenizer: folder or hub id of the tokenizer files; by default the folder
                that the server was started with, if it is on this machine, else the server is asked.
            chat_template: as of `Pair.local`, for sides whose tokenizer files are here.
            base_api_key, teacher_api_key: by default MIDLOGIT_BASE_API_KEY and MIDLOGIT_TEACHER_API_KEY of the
                environment, else OPENAI_API_KEY.
            connection_pool_size: most connections at once. max_retries: of a call that failed.
            timeout: seconds for one call; no request outlives (max_retries + 1) of them and the waits between.

        Raises:
            ServerUnavailable: a server that cannot be reached, refuses the key, or lacks what is needed.
            PairMismatch: tokenizers that disagree.
            InvalidRequest: a URL, model name, top_k or speculation that cannot be honoured.
            MissingExtra: aiohttp is not installed.
        """
        from midlogit.engines.http.opening import open_pair

        mixing, engine = open_pair(
            base=(base, base_model, base_tokenizer, base_api_key),
            teacher=(teacher, teacher_model, teacher_tokenizer, teacher_api_key),
            templates=names_of_sides(chat_template),
            top_k=top_k,
            tolerance=tolerance,
            speculation=speculation,
            connection_pool_size=connection_pool_size,
            max_retries=max_retries,
            timeout=timeout,
        )
        return cls(mixing, engine)

    @classmethod
    def vllm(
        cls,
        base: str | Path | None = None,
        teacher: str | Path | None = None,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: tuple[int, int] | None = None,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        speculation: SpeculationOption = "auto",
        chat_template: TemplateNames = None,
        **engine_args: Any,
    ) -> Self:
        """Two models inside this process on vLLM's scheduler, paged attention and CUDA graphs, full vocabulary.

        Args:
            base, teacher: Hugging Face model folders or hub ids; without names the bundled pair.
            dtype: as vLLM names it: "auto" (the model's own), "bfloat16", "float16", "float32".
            gpu_memory_utilization: share of the device that both models and their caches may take together.
            kv_cache_memory_bytes: sizes of the KV caches of (base, teacher); by default what is left, split so
                that both hold the same number of tokens.
            max_num_seqs: most sequences that run at once; more wait.
            max_model_len: most tokens of prompt and completion; by default what both models allow.
            speculation: tokens that the base drafts ahead for the teacher to check at once; "auto" chooses as
                many as measured times say pay. It changes the speed, never the tokens (docs/speculation.md).
            chat_template: as of `Pair.local`.
            engine_args: further options of vLLM's EngineArgs, for both models (docs/vllm.md).

        Raises:
            ModelUnavailable: a model that is not there, or that vLLM cannot run.
            DoesNotFit: models and caches larger than the device; says how much each needs and what is free.
            PairMismatch: tokenizers that disagree.
            InvalidRequest: a value out of range, or a vLLM option that two engines in lock-step cannot honour.
            MissingExtra: vLLM is not installed; UnsupportedVersion: one whose internals are not known.
        """
        from midlogit.engines.vllm.opening import open_pair

        mixing, engine = open_pair(
            base,
            teacher,
            dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            speculation=speculation,
            chat_template=chat_template,
            options=engine_args,
        )
        return cls(mixing, engine)

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
        batch = self.as_completed(
            prompts,
            params,
            base_prompts=base_prompts,
            teacher_prompts=teacher_prompts,
            chat=chat,
            chat_template_kwargs=chat_template_kwargs,
            add_special_tokens=add_special_tokens,
            request_ids=request_ids,
        )
        shown = progress if progress is not None else batch.size > 1 and sys.stderr.isatty()
        from tqdm import tqdm

        try:
            for _ in tqdm(batch, total=batch.size, disable=not shown, unit="completion"):
                pass
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C ends the wait for what was aborted
                batch.stop()
            raise Interrupted(batch.ended) from None
        return batch.ended

    def as_completed(
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
        strict: bool = True,
    ) -> Batch:
        """`generate` that yields each completion as soon as it ends, in whatever order they do.

        `index` and `sample` of a completion say which it is.

        Args:
            strict: raise for a prompt that cannot be honoured; off, its completions end with finish_reason "error".
        """
        reading = Reading(chat, chat_template_kwargs, add_special_tokens)
        return self.start(
            self._requests(
                prompts, params, base_prompts, teacher_prompts, reading, request_ids=request_ids, strict=strict
            )
        )

    def start(self, requests: Sequence[Request]) -> Batch:
        """Starts prepared requests; their completions as they end."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return Batch(self._engine, self._submit(list(requests), lambda _: events.put), events)

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
        reading = Reading(chat, chat_template_kwargs, add_special_tokens)
        # In a thread: where a server makes the ids of the prompts, that takes a while.
        requests = await asyncio.to_thread(
            self._requests, prompts, params, base_prompts, teacher_prompts, reading, request_ids=request_ids
        )
        loop = asyncio.get_running_loop()
        ends: list[asyncio.Future[Completion]] = [loop.create_future() for _ in requests]

        def listener(number: int) -> Callable[[Event], None]:
            def hear(event: Event) -> None:
                if isinstance(event, Completion):
                    _tell(loop, lambda: _resolve(ends[number], event))

            return hear

        running = self._submit(requests, listener)
        try:
            return list(await asyncio.gather(*ends))
        except asyncio.CancelledError:
            self._engine.abort(running)
            raise

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
        request = self._stream_request(prompt, params, base_prompt, teacher_prompt, reading)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return self._events(self._submit([request], lambda _: events.put), events)

    def _events(self, running: list[Running], events: queue.SimpleQueue[Event]) -> Iterator[Event]:
        try:
            while True:
                event = wait_for(events)
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            self._engine.abort(running)

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
        request = await asyncio.to_thread(self._stream_request, prompt, params, base_prompt, teacher_prompt, reading)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        running = self._submit([request], lambda _: lambda event: _tell(loop, lambda: events.put_nowait(event)))
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            self._engine.abort(running)

    async def run(self, requests: Sequence[Request]) -> AsyncGenerator[Event, None]:
        """Runs prepared requests; yields their events, of all together as they come, until each has its Completion.

        Leaving early aborts what still runs.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        running = self._submit(list(requests), lambda _: lambda event: _tell(loop, lambda: events.put_nowait(event)))
        left = len(running)
        try:
            while left:
                event = await events.get()
                left -= isinstance(event, Completion)
                yield event
        finally:
            if left:
                self._engine.abort(running)

    def prepare(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        reading: Reading,
        *,
        base_prompts: Sequence[Prompt] | None = None,
        generates: bool = True,
        stream: bool = False,
        strict: bool = True,
    ) -> list[Request]:
        """The requests of a call, checked in full and ready for `start`, `run` and `run_scores`; starts nothing.

        Args:
            generates: a token must fit after each prompt; not so where they are for `run_scores` alone.
            strict: raise for a prompt that cannot be honoured; off, the `error` of its requests says why.

        Raises:
            InvalidRequest: for anything that cannot be honoured.
        """
        return self._requests(
            prompts, params, base_prompts, None, reading, generates=generates, stream=stream, strict=strict
        )

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
        """log q of the tokens of given texts, each behind the tokens before it.

        Where the two sides' prompts differ, their common ending is scored, each model behind its own prompt. Ctrl-C
        drops the texts that still wait.

        Raises:
            InvalidRequest: before anything runs, for anything that cannot be honoured.
        """
        scores: queue.SimpleQueue[Scores] = queue.SimpleQueue()
        once = replace(params or SamplingParams.preset(DEFAULT_PRESET), n=1)
        reading = Reading(chat, chat_template_kwargs, add_special_tokens)
        requests = self._requests(prompts, once, base_prompts, teacher_prompts, reading, generates=False)
        scored = [Scored(ScoreRequest.of(request), scores.put) for request in requests]
        try:
            self._engine.score(scored)
            return sorted((wait_for(scores) for _ in requests), key=lambda s: s.index)
        except KeyboardInterrupt:
            self._engine.forget(scored)
            raise

    async def run_scores(self, requests: Sequence[Request]) -> list[Scores]:
        """`score` of the prompts of prepared requests for asyncio; cancelling the task drops those that wait."""
        loop = asyncio.get_running_loop()
        ends: list[asyncio.Future[Scores]] = [loop.create_future() for _ in requests]

        def listener(end: asyncio.Future[Scores]) -> Callable[[Scores], None]:
            return lambda scores: _tell(loop, lambda: _resolve(end, scores))

        scored = [Scored(ScoreRequest.of(r), listener(end)) for r, end in zip(requests, ends, strict=True)]
        self._engine.score(scored)
        try:
            return list(await asyncio.gather(*ends))
        except asyncio.CancelledError:
            self._engine.forget(scored)
            raise

    def statistics(self) -> dict[str, Any]:
        """Counts since the pair was opened (see `midlogit.outputs.Statistics`), the success_rate, and `speculation`:
        what became of drafts (see `midlogit.engines.draft_length.DraftLength.statistics`)."""
        return {**self._statistics.to_dict(), "speculation": self._engine.draft_length.statistics()}

    def close(self) -> None:
        """Aborts what runs and frees the models; in a process that was forked from the pair's own, does nothing."""
        if os.getpid() == self._process:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
            raise InvalidRequest(f"n is {params.n}.", "A stream is one completion: open one for each.")
        one = [None if p is None else [p] for p in (prompt, base_prompt, teacher_prompt)]
        return self._requests(one[0], params, one[1], one[2], reading, stream=True)[0]

    def _requests(
        self,
        prompts: Sequence[Prompt] | None,
        params: SamplingParams | None,
        base_prompts: Sequence[Prompt] | None,
        teacher_prompts: Sequence[Prompt] | None,
        reading: Reading,
        *,
        generates: bool = True,
        stream: bool = False,
        request_ids: Sequence[str] | None = None,
        strict: bool = True,
    ) -> list[Request]:
        """Every request of a call, checked in full before any runs."""
        self._require_own_process()
        return build_requests(
            self.mixing,
            pair_up(prompts, base_prompts, teacher_prompts),
            params or SamplingParams.preset(DEFAULT_PRESET),
            reading,
            generates=generates,
            stream=stream,
            request_ids=request_ids,
            strict=strict,
        )

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

    def _submit(self, requests: list[Request], listener: Callable[[int], Callable[[Event], None]]) -> list[Running]:
        """Starts the requests; events of request number i go to listener(i), completions once they are counted."""
        detokenizer = self.mixing.teacher.detokenizer
        running: list[Running] = []

        def counted(number: int) -> Callable[[Event], None]:
            hear = listener(number)

            def count_then_hear(event: Event) -> None:
                if isinstance(event, Completion):
                    self._statistics.count(event.finish_reason, running[number].decisions)
                    if self.observer is not None:
                        self.observer(running[number])
                hear(event)

            return count_then_hear

        running += [Running(request, detokenizer, counted(number)) for number, request in enumerate(requests)]
        for sequence in running:
            if sequence.request.error is None:
                self._engine.submit(sequence)
            else:
                sequence.end("error", error=sequence.request.error)
        return running


def _resolve(end: asyncio.Future[_T], result: _T) -> None:
    if not end.done():
        end.set_result(result)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Runs a call in an event loop from the engine's thread; a loop that has closed listens no more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
