"""The bodies that the server sends, as typed dictionaries that OpenAPI describes; knows no handler."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from midlogit.outputs import Side


class ErrorInfo(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    error: ErrorInfo


class Usage(TypedDict):
    """Token counts; prompt_tokens counts the teacher's prompts, each once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class MixtureFacts(TypedDict, total=False):
    """Data of the mixture; lists have one entry per token and are those of `midlogit generate --json`."""

    diagnostics: dict[str, list[Any]]
    top: list[dict[str, list[tuple[int, float]]]]
    tokens: dict[str, str]
    base_prompt_tokens: int
    base_prompt_token_ids: list[int]
    teacher_prompt_token_ids: list[int]
    first_scored: int
    prompt_diagnostics: dict[str, list[Any]]


class WeightVersion(TypedDict):
    """A version of the base's weights, and the tokens start to end − 1 that it drew."""

    version: int | str
    start: int
    end: int


class PromptLogprob(TypedDict):
    """A token at one position of a prompt; a rank beyond the candidates is that of none of them."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionLogprobs(TypedDict):
    """log q of the distribution sampled from; null for a token without context."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class CompletionChoice(_CompletionChoice, total=False):
    token_ids: list[int]
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[str, PromptLogprob] | None]
    weight_versions: list[WeightVersion]
    weights_changed: list[Side]
    midlogit: MixtureFacts


class _CompletionResponse(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]


class CompletionResponse(_CompletionResponse, total=False):
    usage: Usage | None


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """log q of the distribution sampled from."""

    content: list[TokenLogprob]


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class _ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class ChatChoice(_ChatChoice, total=False):
    token_ids: list[int]
    weight_versions: list[WeightVersion]
    weights_changed: list[Side]
    midlogit: MixtureFacts


class _ChatResponse(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatResponse(_ChatResponse, total=False):
    prompt_token_ids: list[int]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    base: str
    teacher: str
    stop_token_ids: list[int]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class _Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]


class Tokenized(_Tokenized, total=False):
    token_strs: list[str]


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Version(TypedDict):
    version: str
