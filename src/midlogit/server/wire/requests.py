"""The bodies that clients send, as pydantic models; knows names, types and ranges, no model and no engine.

Names and meanings are OpenAI's, then vLLM's. Fields of the mixture are under one key, `midlogit`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from midlogit.errors import InvalidField
from midlogit.messages import ANY, Harmless, asks_for_nothing, plain_message, template_variables
from midlogit.params import MOST_LOGPROBS
from midlogit.server.errors import ApiError, from_validation
from midlogit.server.wire.options import INSTEAD, OF_TEMPLATES, OPTIONS

MAX_INT = 2**31 - 1
MOST_MESSAGES = 10_000
MOST_STOP_CHARACTERS = 4000  # of all stop strings: each is compared with the text at every token

TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
AnyInt = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class Body(BaseModel):
    """A body in which unknown fields and loose types are errors: nothing that a client asks for is silently dropped.

    Fields that ask for nothing, such as nulls, are dropped at every depth.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    harmless: ClassVar[Harmless] = {}
    _size: int = PrivateAttr(0)

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return self._size

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields  # not cheap
        asked: dict[str, Any] = {}
        for name, value in data.items():
            if name in known and value is not None:
                asked[name] = value
            elif name not in known and not asks_for_nothing(name, value, cls.harmless):
                raise InvalidField(f"Unknown option {name!r:.80}.", "Leave it out.", name)
        return asked


B = TypeVar("B", bound=Body)


def validated(fields: dict[str, Any], kind: type[B]) -> B:
    """The body that has these fields.

    Raises:
        ApiError: 400 for an option that cannot be honoured, 422 for a wrong type or a value out of range.
    """
    check_options(fields, kind)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


def check_options(fields: dict[str, Any], kind: type[Body]) -> None:
    """Refuses fields of a body that `kind` does not know, unless they ask for nothing.

    Raises:
        ApiError: 400.
    """
    known = kind.model_fields
    for name, value in fields.items():
        if name in known or asks_for_nothing(name, value, kind.harmless):
            continue
        reason = (
            f"midlogit cannot honour {name!r:.80}."
            if name in OPTIONS
            else f"Unknown option {name!r:.80}."
        )
        raise ApiError(
            400,
            "unsupported_option",
            reason,
            INSTEAD.get(name, "Leave it out."),
            param=name,
        )


class TextPart(Body):
    type: Literal["text"] = "text"
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        return plain_message(data)

    @property
    def plain(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        return self.model_dump(exclude_none=True)


def _few_messages(value: Any) -> Any:
    """Counts messages before any is looked at."""
    if isinstance(value, list) and len(value) > MOST_MESSAGES:
        raise ValueError(f"List should have at most {MOST_MESSAGES} items, not {len(value)}")
    return value


Messages = Annotated[
    list[Message],
    Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES),
    BeforeValidator(_few_messages),
]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]
OnePrompt = str | Messages | TokenIds
Prompts = Annotated[list[OnePrompt], Field(fail_fast=True, min_length=1)]
TemplateKwargs = Annotated[dict[str, Any], AfterValidator(template_variables)]


class MixtureOptions(Body):
    """Options of the mixture, for this request."""

    preset: str | None = Field(
        default=None,
        description="conservative, balanced, exploratory or rollout; the server's default.",
    )
    target_top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Hold the support to the teacher's nucleus of this mass.",
    )
    force_first_token: bool | None = Field(
        default=None, description="Draw the first token from the teacher alone."
    )
    alpha_rule: str | None = Field(
        default=None, description="equal-kl, fixed:ALPHA or kl-budget:NATS."
    )
    stop_id: Literal["teacher", "base"] | None = Field(
        default=None, description="Whose stop id ends a completion; the preset's."
    )
    base_prompt: OnePrompt | None = Field(
        default=None,
        description="The base's prompt in place of the common one: text, chat messages or token ids.",
    )
    teacher_prompt: OnePrompt | Prompts | None = Field(
        default=None,
        description="The teacher's in place of the common one, or a list of one for each prompt.",
    )
    base_chat_template_kwargs: TemplateKwargs | None = Field(
        default=None,
        description="Variables of the base's chat template, in place of chat_template_kwargs.",
    )
    diagnostics: bool = Field(
        default=False, description="Answer with α, both KLs and the rest, one entry per token."
    )


class StreamOptions(Body):
    harmless = {"continuous_usage_stats": (False,), "include_obfuscation": ANY}
    include_usage: bool = False


class Sampling(Body):
    """Fields of both completion endpoints."""

    harmless = OPTIONS
    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(
        default=1.0, ge=0, le=100, description="0 is greedy; otherwise at least 0.01."
    )
    seed: AnyInt | None = None
    stop: list[StopString] = Field(default=[], max_length=64, fail_fast=True)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=64, fail_fast=True)
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT)
    ignore_eos: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    midlogit: MixtureOptions = MixtureOptions()

    @field_validator("stop", "stop_token_ids", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [value]
        return [stop for stop in value if stop is not None] if isinstance(value, list) else value

    @field_validator("stop")
    @classmethod
    def _stops_are_short(cls, value: list[str]) -> list[str]:
        if sum(map(len, value)) > MOST_STOP_CHARACTERS:
            raise ValueError(f"may have {MOST_STOP_CHARACTERS} characters together")
        return value

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("must be 0 (greedy) or at least 0.01")
        return value

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.includes_usage and not self.stream:
            raise ValueError("stream_options.include_usage needs stream: true")
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Sampling):
    prompt: (
        str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    ) = Field(description="Text, texts, token ids, or lists of token ids; both models read it.")
    max_tokens: int = Field(default=16, ge=0, le=MAX_INT)
    add_special_tokens: bool = Field(
        default=True,
        description="Encode text with what each tokenizer adds, such as BOS; not twice where the text has it.",
    )
    echo: bool = Field(
        default=False, description="Begin the answer with the prompt; with logprobs, score it."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="log q of each token and of this many candidates."
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MOST_LOGPROBS,
        description="log q of each token of the prompt and of this many candidates, in vLLM's form.",
    )

    @model_validator(mode="after")
    def _prompt_logprobs_stand_alone(self) -> CompletionBody:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs needs stream: false")
        if self.prompt_logprobs is not None and self.echo and self.logprobs is not None:
            raise ValueError("prompt_logprobs and an echo with logprobs say the same: ask for one")
        return self


class ChatBody(Sampling):
    messages: Messages
    chat_template_kwargs: TemplateKwargs | None = Field(
        default=None, description="Variables of both chat templates, such as enable_thinking."
    )
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
    harmless = OF_TEMPLATES
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError(
                "add_special_tokens: true goes with prompt; a chat template writes its own"
            )
        if self.messages is None and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs goes with messages")
        return self


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
