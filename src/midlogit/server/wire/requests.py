"""The bodies that clients send, as pydantic models; knows names, types and ranges, no model and no engine.

Names and meanings are OpenAI's, then vLLM's. What the mixture adds stands under one key, `midlogit`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from midlogit.server.errors import ApiError

MAX_INT = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
AnyInt = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]

ANY: tuple[Any, ...] = ()
HARMLESS: dict[str, tuple[Any, ...]] = {
    # Options that midlogit has no use for, with the values that ask for nothing; ANY value asks for nothing.
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": ANY,
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "user": ANY,
    "metadata": ANY,
    "safety_identifier": ANY,
    "prompt_cache_key": ANY,
}
INSTEAD = {
    "top_p": "To hold the mixture to the teacher's nucleus, use midlogit.target_top_p.",
    "best_of": "Use n.",
}


class Body(BaseModel):
    """Unknown fields and loose types are errors: nothing that a client asks for is silently dropped."""

    model_config = ConfigDict(extra="forbid", strict=True)


def check_options(fields: dict[str, Any], kind: type[Body]) -> dict[str, Any]:
    """The fields that `kind` knows; others only if they ask for nothing.

    Raises:
        ApiError: 400 for an option that cannot be honoured.
    """
    known = {name: value for name, value in fields.items() if name in kind.model_fields}
    for name, value in fields.items():
        if name in known or (name in HARMLESS and (HARMLESS[name] is ANY or value in HARMLESS[name])):
            continue
        reason = f"midlogit cannot honour {name!r:.80}." if name in HARMLESS else f"Unknown option {name!r:.80}."
        raise ApiError(400, "unsupported_option", f"{reason} {INSTEAD.get(name, 'Leave it out.')}", param=name[:80])
    return known


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        # Clients send back the answers that they got, with all their empty fields.
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def plain(self) -> dict[str, str]:
        """The message as chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name is not None else {})


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=10_000)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]


class MixtureOptions(Body):
    """How the two models are mixed for this request."""

    preset: str | None = Field(default=None, description="conservative, balanced or exploratory; the server's default.")
    target_top_p: float | None = Field(
        default=None, gt=0, le=1, description="Hold the support to the teacher's nucleus of this mass."
    )
    force_first_token: bool | None = Field(default=None, description="Draw the first token from the teacher alone.")
    alpha_rule: str | None = Field(default=None, description="equal-kl, fixed:ALPHA or kl-budget:NATS.")
    base_prompt: str | Messages | TokenIds | None = Field(
        default=None, description="What the base reads in place of the prompt: text, chat messages or token ids."
    )
    diagnostics: bool = Field(default=False, description="Answer with α, both KLs and the rest, one entry a token.")


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What both completion endpoints take."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 is greedy; otherwise at least 0.01.")
    seed: AnyInt | None = None
    stop: list[StopString] = Field(default=[], max_length=64)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=64)
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT)
    ignore_eos: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    midlogit: MixtureOptions = MixtureOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("must be 0 (greedy) or at least 0.01")
        return value

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Sampling):
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)] = Field(
        description="Text, texts, token ids, or lists of token ids; both models read it."
    )
    max_tokens: int = Field(default=16, ge=0, le=MAX_INT)
    echo: bool = Field(default=False, description="Begin the answer with the prompt; with logprobs, score it.")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="log q of each token and of so many candidates."
    )


class ChatBody(Sampling):
    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
