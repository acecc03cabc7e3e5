"""Requests of an OpenAI batch file, which `vllm run-batch` reads too; knows their bodies as the server does, no file.

A body means what it means to the server, but what it leaves out is the job's, and its model is not looked at.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from midlogit.errors import InvalidRequest
from midlogit.requests.prompts import Prompt
from midlogit.server.errors import ApiError
from midlogit.server.parameters import base_prompts, teacher_prompts
from midlogit.server.wire.requests import ChatBody, CompletionBody, Sampling, validated

KINDS: dict[str, type[ChatBody | CompletionBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}
SAME_NAMES = ("n", "seed", "temperature", "stop", "stop_token_ids", "min_tokens", "ignore_eos")
OF_THE_MIXTURE = ("preset", "target_top_p", "force_first_token", "alpha_rule", "stop_id")
OF_THE_JOB = "It is one for all rows of a job: leave it out here."


class BatchRequest(NamedTuple):
    """The prompts of a body, and the parameters that it sets."""

    prompt: Prompt
    base_prompt: Prompt | None
    overrides: dict[str, Any]


def read_request(method: Any, url: Any, body: Any) -> BatchRequest:
    """Reads the request of a line.

    Raises:
        InvalidRequest: it asks for what cannot be honoured; names the field.
    """
    if method != "POST":
        raise InvalidRequest(f"Its method is {method!r:.80}.", "Use POST.")
    if not isinstance(url, str) or url not in KINDS:
        raise InvalidRequest(f"Its url is {url!r:.80}.", f"Use {' or '.join(KINDS)}.")
    if not isinstance(body, dict):
        raise InvalidRequest("Its body is no JSON object.")

    try:
        read = validated(body, KINDS[url])
        base_own, teacher_own = base_prompts(read.midlogit, 1), teacher_prompts(read.midlogit, 1)
    except ApiError as error:
        told = f"Its body cannot be honoured. {error.message}"
        raise InvalidRequest(told, error.hint) from None

    prompt, overrides = _of_chat(read) if isinstance(read, ChatBody) else _of_completion(read)
    base_prompt = None if base_own is None else _listed(base_own[0])
    if teacher_own is not None:
        base_prompt = prompt if base_prompt is None else base_prompt
        prompt = _listed(teacher_own[0])
    return BatchRequest(prompt, base_prompt, _sampling(read) | overrides)


def _listed(prompt: Prompt) -> Prompt:
    """A prompt as inputs of other formats hold it."""
    return prompt if isinstance(prompt, str) else list(prompt)  # type: ignore[return-value]


def _of_chat(body: ChatBody) -> tuple[Prompt, dict[str, Any]]:
    overrides = {
        "chat_template_kwargs": body.chat_template_kwargs or None,
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "top_logprobs": body.top_logprobs or None,
    }
    return [message.plain for message in body.messages], _given(overrides)


def _of_completion(body: CompletionBody) -> tuple[Prompt, dict[str, Any]]:
    _refuse("echo", body.echo, "The prompt is written beside the text: leave it out.")
    _refuse(
        "prompt_logprobs",
        body.prompt_logprobs is not None,
        "Completions are written: leave it out.",
    )
    _refuse("add_special_tokens", not body.add_special_tokens, OF_THE_JOB)
    overrides = {
        "max_tokens": body.max_tokens if "max_tokens" in body.model_fields_set else None,
        "top_logprobs": body.logprobs or None,
    }

    prompt: Any = body.prompt
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise InvalidRequest(
                f"Its body has {len(prompt)} prompts in 'prompt'.", "Give each a line of its own."
            )
        prompt = prompt[0]
    return prompt, _given(overrides)


def _sampling(body: Sampling) -> dict[str, Any]:
    """The parameters that bodies of both kinds may set."""
    _refuse("stream", body.stream, "Completions are written whole: leave it out.")
    options = body.midlogit
    _refuse("midlogit.base_chat_template_kwargs", options.base_chat_template_kwargs, OF_THE_JOB)

    same = {name: getattr(body, name) for name in SAME_NAMES if name in body.model_fields_set}
    return same | _given({name: getattr(options, name) for name in OF_THE_MIXTURE})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse(name: str, asks: object, hint: str) -> None:
    """Refuses a field that the server honours and a job does not, if it asks for something."""
    if asks:
        raise InvalidRequest(f"Its body has {name!r}, which a job cannot honour.", hint)
