"""The body of token ids that trainers send, as pydantic models; knows names and types, no handler."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from midlogit.messages import ANY, Harmless
from midlogit.params import MOST_LOGPROBS
from midlogit.server.wire.options import OPTIONS
from midlogit.server.wire.requests import (
    MAX_INT,
    Body,
    Sampling,
    StreamOptions,
    TokenIds,
    check_options,
)

# The answer is ids: how they would be shown asks for nothing. New weights clear the base's cache, which needs no salt.
OF_TOKENS: Harmless = {
    **OPTIONS,
    "cache_salt": ANY,
    "detokenize": (True, False),
    "routed_experts_prompt_start": ANY,
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
}


class TokenSampling(Sampling):
    harmless: ClassVar[Harmless] = OF_TOKENS
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_INT, description="Without it a completion may fill the context."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="log q of each token and of this many candidates."
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MOST_LOGPROBS, description="As of /v1/completions."
    )

    @model_validator(mode="before")
    @classmethod
    def _asks_for_what_can_be_honoured(cls, data: Any) -> Any:
        if isinstance(data, dict):
            check_options(data, cls)
        return data


class TokensBody(Body):
    """vLLM's body of /inference/v1/generate."""

    harmless: ClassVar[Harmless] = {
        **OF_TOKENS,
        "content_parts": ([],),
        "features": ({},),
        "output_mode": ("tokens",),
    }
    model: str | None = None
    token_ids: TokenIds = Field(description="The prompt; both models read it.")
    sampling_params: TokenSampling = TokenSampling()
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> TokensBody:
        self.sampling_params.stream = self.stream
        self.sampling_params.stream_options = self.stream_options
        return self
