"""The bodies that trainers send to change the base's weights, as pydantic models; knows names and types, no file."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from midlogit.messages import ANY, Harmless
from midlogit.server.wire.requests import Body

Version = int | Annotated[str, Field(max_length=200)]  # every completion repeats it


class InitBody(Body):
    init_info: dict[str, Any] = Field(
        default={}, description="Where to meet the trainer, as vLLM's transfer of weights reads it."
    )


class StartBody(Body):
    is_checkpoint_format: bool = Field(
        default=True, description="The names are those of the checkpoint."
    )


class UpdateBody(Body):
    update_info: dict[str, Any] | None = Field(
        default=None,
        description="path of a file or folder below --weights-root; or names, dtype_names and shapes of what comes.",
    )
    weight_dir: str | None = Field(
        default=None, description="A whole update in one call: a path below --weights-root."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> UpdateBody:
        if (self.update_info is None) == (self.weight_dir is None):
            raise ValueError("give either update_info or weight_dir")
        return self


class DiskBody(Body):
    harmless: ClassVar[Harmless] = {"load_format": ("auto", "safetensors"), "flush_cache": ANY}
    model_path: str = Field(description="A file or folder below --weights-root.")
    weight_version: Version | None = None


class FinishBody(Body):
    weight_version: Version | None = Field(
        default=None, description="The version of the new weights; without one, the next number."
    )


class CheckBody(Body):
    action: Literal["checksum"]


class AbortBody(Body):
    request_ids: list[str] | None = None
    abort_all: bool = True
