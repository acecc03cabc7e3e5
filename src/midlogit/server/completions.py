"""POST /v1/completions: the legacy endpoint, with echo and scoring; knows its body and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from midlogit.models.detokenize import REPLACEMENT
from midlogit.outputs import Completion, Scores, Token
from midlogit.requests.prompts import Prompt, Reading
from midlogit.server.alone import Side, alone, require_no_mixture
from midlogit.server.body import read_body
from midlogit.server.call import Call, add_versions, respond
from midlogit.server.errors import ApiError
from midlogit.server.parameters import sampling_params, template_kwargs
from midlogit.server.pieces import completion_logprobs, facts_of_scores, joined, tops_of
from midlogit.server.prompt_logprobs import prompt_logprobs
from midlogit.server.service import MODEL, Service
from midlogit.server.vocabulary import Offsets
from midlogit.server.wire.requests import CompletionBody
from midlogit.server.wire.responses import CompletionLogprobs


async def completions(http: HttpRequest, side: Side | None = None) -> Response:
    """Completions and scores of q*, or of one side alone."""
    service: Service = http.app.state.service
    body = await read_body(http, CompletionBody, service.settings.max_body_bytes)
    service.require_model(body.model, side)
    if side is not None:
        require_no_mixture(body, side)
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise ApiError(
            400,
            "invalid_request",
            "max_tokens 0 asks for nothing without echo.",
            param="max_tokens",
        )
    return await respond(http, service, body, partial(CompletionCall, service, body, side))


class CompletionCall(Call):
    """A call of the legacy endpoint, to q* or to one side alone."""

    def __init__(self, service: Service, body: CompletionBody, side: Side | None) -> None:
        variables = template_kwargs(
            None, body.midlogit, service.settings.chat_template_kwargs, chat=False
        )
        params = sampling_params(
            body,
            service.settings,
            max_tokens=max(body.max_tokens, 1),
            top_logprobs=body.logprobs or 0,
        )
        scored = [body.prompt_logprobs, body.logprobs if body.echo else None]
        super().__init__(
            service,
            body,
            _as_list(body.prompt),
            params if side is None else alone(params, side),
            prefix="cmpl",
            reading=Reading(
                chat_template_kwargs=variables, add_special_tokens=body.add_special_tokens
            ),
            generates=body.max_tokens > 0,
            scores=max((count for count in scored if count is not None), default=None),
            model=side or MODEL,
        )
        self._body, self._side = body, side
        self._text_of = cache(self._decoded)  # of a prompt by its index
        self._offsets: dict[int, Offsets] = {}
        self._unfinished: dict[
            int, list[int]
        ] = {}  # ids after an echo whose last character they may complete

    def frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        return {"object": "text_completion", "choices": choices}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt, where it is echoed or its ids are returned."""
        body, prompt = self._body, self.prompt_of(index)
        if not (body.echo or body.return_token_ids or self.scores):
            return None

        choice = _empty(index, None if self.requests else "length")
        if body.echo:
            choice["text"] = self._text_of(prompt.index)
            if (
                self.requests
                and not isinstance(prompt.prompt, str)
                and choice["text"].endswith(REPLACEMENT)
            ):
                choice["text"] = choice["text"].rstrip(REPLACEMENT)
                self._unfinished[index] = []

        if self.scores:
            self._add_scores(choice, self.scores[prompt.index], index)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": self.prompt_ids(prompt), "token_ids": []}
        return choice

    def delta(self, token: Token, index: int) -> dict[str, Any] | None:
        body = self._body
        choice = _empty(index, None)
        choice["text"] = self._after_echo(index, token.text, [token.token_id])

        if body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(
                [token.token_id],
                [token.decision.logprob],
                [token.decision.top],
                self._offsets_of(index),
                self.service.vocabulary,
                body.return_tokens_as_token_ids,
            )

        self._add_token_data(choice, token)
        return choice if choice["text"] or len(choice) > len(EMPTY) or choice["logprobs"] else None

    def ending(self, completion: Completion, index: int, rest: str) -> dict[str, Any]:
        text = self._after_echo(index, rest, [], ends=True)
        choice = _empty(index, completion.finish_reason)
        choice |= {"text": text, "stop_reason": completion.stop_reason}
        add_versions(choice, completion)
        return choice

    def choice(self, completion: Completion, index: int) -> dict[str, Any]:
        body = self._body
        choice = self.opening(index) or _empty(index, None)
        choice["text"] += self._after_echo(index, completion.text, completion.token_ids, ends=True)
        choice |= {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}

        if body.logprobs is not None:
            generated = completion_logprobs(
                completion.token_ids,
                completion.diagnostics.logprobs,
                tops_of(completion.top, len(completion.token_ids)),
                self._offsets_of(index),
                self.service.vocabulary,
                body.return_tokens_as_token_ids,
            )
            choice["logprobs"] = (
                joined(choice["logprobs"], generated) if choice["logprobs"] else generated
            )

        self._add_completion_data(choice, completion, index)
        return choice

    @property
    def shows_prompts(self) -> bool:
        return self._body.echo or super().shows_prompts

    def _decoded(self, index: int) -> str:
        """The text of a prompt."""
        prompt = self.prompts[index]
        given = prompt.prompt
        return (
            given if isinstance(given, str) else self.service.vocabulary.decode(prompt.teacher_ids)
        )

    def _after_echo(
        self, index: int, text: str, token_ids: Sequence[int], ends: bool = False
    ) -> str:
        """The text of further ids, with the unfinished last character of the prompt before it if the echo held it back.

        With an echo the text is that of all ids together. So an unfinished character waits for the first text after
        it, and is dropped if that completes it.
        """
        if index not in self._unfinished:
            return text
        self._unfinished[index] += token_ids
        if not (text or ends):
            return ""

        prompt_ids = self.prompt_of(index).teacher_ids
        prompt = self.service.vocabulary.decode(prompt_ids)
        whole = self.service.vocabulary.decode([*prompt_ids, *self._unfinished.pop(index)])
        return (
            prompt[len(prompt.rstrip(REPLACEMENT)) :] + text if whole.startswith(prompt) else text
        )

    def _offsets_of(self, index: int) -> Offsets:
        """Offsets of the completion's tokens; with an echo they continue those of the prompt."""
        if index not in self._offsets:
            self._offsets[index] = self.service.vocabulary.offsets(
                self.prompt_of(index).teacher_ids
            )
        return self._offsets[index]

    def _add_scores(self, choice: dict[str, Any], scores: Scores, index: int) -> None:
        """Adds the scores of the prompt in the forms that the body asks for."""
        body = self._body
        if body.echo and body.logprobs is not None:
            choice["logprobs"] = self._echoed_logprobs(scores, index)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.prompt_ids(self.prompt_of(index)), scores, self.service.vocabulary, self._side
            )
        if body.midlogit.diagnostics:
            choice["midlogit"] = facts_of_scores(scores)
        if scores.weights_changed:
            choice["weights_changed"] = scores.weights_changed

    def _echoed_logprobs(self, scores: Scores, index: int) -> CompletionLogprobs:
        vocabulary = self.service.vocabulary
        # The ids may decode to more than the prompt's text: they begin with what the tokenizer adds.
        added = len(vocabulary.decode(scores.token_ids)) - len(self._text_of(index // self.n))
        offsets = self._offsets[index] = vocabulary.echo_offsets(-added)

        context: list[None] = [None] * scores.first
        found = completion_logprobs(
            scores.token_ids,
            [*context, *scores.diagnostics.logprobs],
            [*context, *tops_of(scores.top, len(scores.token_ids) - scores.first)],
            offsets,
            vocabulary,
            self._body.return_tokens_as_token_ids,
        )
        offsets.completion_begins(vocabulary.shows)
        return found


EMPTY = ("index", "text", "logprobs", "finish_reason", "stop_reason")


def _empty(index: int, finish_reason: str | None) -> dict[str, Any]:
    return dict.fromkeys(EMPTY) | {"index": index, "text": "", "finish_reason": finish_reason}


def _as_list(prompt: Any) -> list[Prompt]:
    """The prompts of a body: one, or a list of them."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
