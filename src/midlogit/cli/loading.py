"""Opens a pair for the command line, quietly; knows which noise the libraries make, URLs from folders, the engines."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from midlogit.engines.draft_length import SpeculationOption, require_speculation
from midlogit.engines.http.urls import looks_like_server
from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.messages import template_variables
from midlogit.pair import Pair

ENGINES = ("auto", "local", "vllm")
SLOTS = {"local": 16, "vllm": 256}

Templates = tuple[str | None, str | None]  # names of the chat templates of base and teacher


@dataclass(frozen=True, slots=True)
class InProcess:
    """What the command line says of models in this process.

    Attributes:
        engine: auto, local (transformers) or vllm. device: auto, a device, or BASE,TEACHER.
        max_num_seqs: None for the engine's default.
        gpu_memory_utilization, max_model_len: of vLLM alone.
        speculation: auto, off or a number of drafts.
    """

    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    speculation: SpeculationOption = "auto"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InvalidRequest(f"Unknown engine {self.engine!r}.", f"Use {', '.join(ENGINES)}.")
        if self.engine == "vllm" and self.device != "auto":
            raise InvalidRequest(
                f"--device {self.device} cannot be used with vLLM, which takes the first.",
                "Choose one by CUDA_VISIBLE_DEVICES.",
            )

    @property
    def slots(self) -> int:
        """Most sequences that run at once."""
        return SLOTS["vllm" if self.engine == "vllm" else "local"] if self.max_num_seqs is None else self.max_num_seqs

    def open(self, base: str | None, teacher: str | None, templates: Templates = (None, None)) -> Pair:
        if self.engine == "vllm":
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            return Pair.vllm(
                base,
                teacher,
                dtype=self.dtype,
                max_num_seqs=self.slots,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_model_len,
                speculation=self.speculation,
                chat_template=templates,
            )
        base_device, comma, teacher_device = self.device.partition(",")
        device = (base_device, teacher_device) if comma else base_device
        return Pair.local(
            base,
            teacher,
            device=device,
            dtype=self.dtype,
            max_num_seqs=self.slots,
            speculation=self.speculation,
            chat_template=templates,
        )


def parse_template_kwargs(text: str | None, base_text: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of the chat templates from JSON objects: of both sides, and of the base in their place.

    Raises:
        InvalidRequest: no JSON object, or variables that cannot be honoured.
    """
    both = _template_kwargs("--chat-template-kwargs", text)
    return _template_kwargs("--base-chat-template-kwargs", base_text) if base_text is not None else both, both


def _template_kwargs(option: str, text: str | None) -> dict[str, Any]:
    try:
        given = {} if text is None else orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{option} is not JSON: {error}.", 'Write {"enable_thinking": false}.') from None
    return template_variables(given)


def parse_speculation(text: str) -> SpeculationOption:
    """auto, off or a number of drafts.

    Raises:
        InvalidRequest: for any other text, or a number out of range.
    """
    asked: Any = int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text
    require_speculation(asked)
    return asked  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Serving:
    """What the command line says of two servers; `top_k` is a number or "auto"."""

    top_k: str = "20"
    base_model: str | None = None
    teacher_model: str | None = None
    base_tokenizer: str | None = None
    teacher_tokenizer: str | None = None
    base_api_key: str | None = field(default=None, repr=False)
    teacher_api_key: str | None = field(default=None, repr=False)
    speculation: SpeculationOption = "auto"

    def options(self) -> dict[str, Any]:
        """As `Pair.http` and the handshake take them."""
        names = (
            "base_model",
            "teacher_model",
            "base_tokenizer",
            "teacher_tokenizer",
            "base_api_key",
            "teacher_api_key",
        )
        try:
            top_k: int | str = self.top_k if self.top_k == "auto" else int(self.top_k)
        except ValueError:
            raise InvalidRequest(f"--top-k is {self.top_k!r}.", "Give a number or auto.") from None
        return {"top_k": top_k, **{name: getattr(self, name) for name in names}}


def are_urls(base: str | None, teacher: str | None) -> bool:
    """Whether servers are meant.

    Raises:
        InvalidRequest: one server and one folder, or only one of the two.
    """
    if (base is None) != (teacher is None):
        missing = "--teacher" if teacher is None else "--base"
        raise InvalidRequest(f"{missing} is missing.", "Name both models, or neither for the bundled pair.")
    urls = [
        name is not None and looks_like_server(name) and not Path(name).expanduser().exists()
        for name in (base, teacher)
    ]
    if any(urls) and not all(urls):
        raise InvalidRequest("One model is a server and one a folder.", "Name two servers or two folders.")
    return all(urls)


def servers(urls: str) -> list[str]:
    """The URLs of a side: several are parted by commas."""
    return [url for part in urls.split(",") if (url := part.strip())]


def quiet_transformers() -> None:
    """Keeps progress bars and advice of transformers off the terminal."""
    logging = require("transformers.utils.logging", "local")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def open_pair(
    base: str | None,
    teacher: str | None,
    *,
    here: InProcess | None = None,
    serving: Serving | None = None,
    templates: Templates = (None, None),
) -> Pair:
    """`Pair.http` for URLs (several a side parted by commas), else models in this process, said on a terminal.

    Raises:
        MidlogitError: as the pair's own; InvalidRequest: an engine for folders, and URLs.
    """
    here = here or InProcess()
    if are_urls(base, teacher) and base and teacher:
        if here.engine != "auto":
            raise InvalidRequest(
                f"--engine {here.engine} runs models here, and two servers are named.", "Leave it out."
            )
        if find_spec("transformers") is not None:
            quiet_transformers()
        serving = serving or Serving()
        return Pair.http(
            servers(base),
            servers(teacher),
            speculation=serving.speculation,
            chat_template=templates,
            **serving.options(),
        )
    quiet_transformers()
    if sys.stderr.isatty():
        print(f"Loading {base or 'the bundled base'} and {teacher or 'teacher'} ...", file=sys.stderr)
    return here.open(base, teacher, templates)
