"""Opens a pair for the command line, quietly; knows the engines, URLs from folders, and the noise of libraries."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import orjson

from midlogit.core.rules import parse_rule
from midlogit.engines.draft_length import SpeculationOption, require_speculation
from midlogit.engines.http.upstream import Upstream
from midlogit.engines.http.urls import looks_like_server
from midlogit.engines.vllm.options import why_unusable
from midlogit.errors import InvalidRequest
from midlogit.extras import has_transformers, require
from midlogit.jobs.source import PairSource
from midlogit.messages import template_variables
from midlogit.pair import Pair

ENGINES = ("auto", "local", "vllm")
OWN_OPTIONS = inspect.signature(Pair.vllm).parameters.keys() - {"kv_cache_memory_bytes"}
MAX_NUM_SEQS = {"local": 16, "vllm": 256, "http": 256}


@dataclass(frozen=True, slots=True)
class InProcess:
    """Options of models in this process.

    Attributes:
        engine: auto, local (transformers) or vllm. device: auto, a device, or BASE,TEACHER.
        gpu_memory_utilization, max_model_len: for vLLM alone.
        engine_args: further keywords of `Pair.vllm`.
        weight_transfer: how vLLM receives new weights of the base, such as nccl; None for not at all.
    """

    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    weight_transfer: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InvalidRequest(f"Unknown engine {self.engine!r}.", f"Use {', '.join(ENGINES)}.")
        if self.engine == "vllm" and self.device != "auto":
            raise InvalidRequest(
                f"--device {self.device} cannot be used with vLLM, which takes the first.",
                "Choose one by CUDA_VISIBLE_DEVICES.",
            )

    @property
    def chosen(self) -> Literal["local", "vllm"]:
        """The engine; of "auto" what this machine has."""
        if self.engine == "auto":
            return "local" if self.device != "auto" or why_unusable() else "vllm"
        return "vllm" if self.engine == "vllm" else "local"


@dataclass(frozen=True, slots=True)
class PairOptions:
    """The two models of a command, and how they are run.

    Attributes:
        base, teacher: folder, hub id, or URL of a server (several separated by commas); None for the bundled pair.
        upstreams: the servers of (base, teacher), for URLs. Their chat templates and trust are those of folders, too.
        in_process: for folders and hub ids.
        top_k: for URLs, a number or "auto".
        speculation: auto, off or a number of drafts per round.
        max_num_seqs: most sequences that run at once; None for the engine's default.
    """

    base: str | None = None
    teacher: str | None = None
    upstreams: tuple[Upstream, Upstream] = (Upstream(()), Upstream(()))
    in_process: InProcess = InProcess()
    top_k: str = "20"
    speculation: SpeculationOption = "auto"
    max_num_seqs: int | None = None

    @property
    def chat_templates(self) -> tuple[str | None, str | None]:
        """Names of the chat templates of (base, teacher)."""
        return self.upstreams[0].chat_template, self.upstreams[1].chat_template

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the models may be run."""
        return self.upstreams[0].trust_remote_code

    @property
    def on_servers(self) -> bool:
        """Whether the models are on servers.

        Raises:
            InvalidRequest: one is and one is not, or only one of the two is named.
        """
        return are_urls(self.base, self.teacher)

    @property
    def slots(self) -> int:
        """Most sequences that run at once.

        Raises:
            InvalidRequest: as `on_servers`.
        """
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return MAX_NUM_SEQS["http" if self.on_servers else self.in_process.chosen]

    def parsed_top_k(self) -> int | Literal["auto"]:
        """`top_k` as `Pair.http` takes it.

        Raises:
            InvalidRequest: neither a number nor "auto".
        """
        try:
            return "auto" if self.top_k == "auto" else int(self.top_k)
        except ValueError:
            raise InvalidRequest(f"--top-k is {self.top_k!r}.", "Give a number or auto.") from None


def open_pair(options: PairOptions) -> Pair:
    """Opens servers for URLs, else models in this process, which is announced on a terminal.

    Raises:
        MidlogitError: as `Pair.http`, `Pair.local` and `Pair.vllm`.
        InvalidRequest: as `require_usable`.
    """
    source = source_of(options)
    announce(options)
    return source.open(seeded=False)


def announce(options: PairOptions) -> None:
    """Says on a terminal that models are loaded."""
    if not options.on_servers and sys.stderr.isatty():
        print(
            f"Loading {options.base or 'the bundled base'} and {options.teacher or 'teacher'} ...",
            file=sys.stderr,
        )


def require_usable(options: PairOptions) -> None:
    """Checks that the options are those of the engine that is chosen; imports none.

    Raises:
        InvalidRequest: URLs together with an engine for folders, or options of another engine.
    """
    here = options.in_process
    if options.on_servers and here.engine != "auto":
        raise InvalidRequest(
            f"--engine {here.engine} runs models here, and two servers are named.", "Leave it out."
        )
    if here.engine_args and (options.on_servers or here.chosen != "vllm"):
        _refuse_engine_args(here.engine_args, options.on_servers)


def source_of(options: PairOptions) -> PairSource:
    """What opens the pair, with the noise of libraries turned off.

    Raises:
        InvalidRequest: as `require_usable`.
    """
    require_usable(options)
    here = options.in_process
    if not options.on_servers or has_transformers():
        quiet_transformers()

    shared: dict[str, Any] = {
        "max_num_seqs": options.slots,
        "speculation": options.speculation,
    }
    if options.on_servers:
        return PairSource("http", *options.upstreams, {"top_k": options.parsed_top_k(), **shared})

    shared |= {
        "dtype": here.dtype,
        "chat_template": options.chat_templates,
        "trust_remote_code": options.trust_remote_code,
    }
    if here.chosen == "vllm":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if here.weight_transfer is not None:
            shared["weight_transfer_config"] = {"backend": here.weight_transfer}
        return PairSource(
            "vllm",
            options.base,
            options.teacher,
            {
                "gpu_memory_utilization": here.gpu_memory_utilization,
                "max_model_len": here.max_model_len,
                **shared,
                **here.engine_args,
            },
        )

    base, comma, teacher = here.device.partition(",")
    device = (base, teacher) if comma else base
    return PairSource("local", options.base, options.teacher, {"device": device, **shared})


def upstream(
    name: str | None,
    model: str | None = None,
    tokenizer: str | None = None,
    api_key: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> Upstream:
    """The servers of a side, from its name and options on the command line."""
    urls = split_urls(name or "")
    return Upstream(urls, model, tokenizer, api_key, chat_template, trust_remote_code)


def split_urls(text: str) -> list[str]:
    """The URLs of a side, separated by commas."""
    return [url for part in text.split(",") if (url := part.strip())]


def are_urls(base: str | None, teacher: str | None) -> bool:
    """Whether two names are URLs of servers.

    Raises:
        InvalidRequest: one server and one folder, or only one of the two.
    """
    if (base is None) != (teacher is None):
        missing = "--teacher" if teacher is None else "--base"
        raise InvalidRequest(
            f"{missing} is missing.", "Name both models, or neither for the bundled pair."
        )

    urls = [
        name is not None and looks_like_server(name) and not Path(name).expanduser().exists()
        for name in (base, teacher)
    ]
    if any(urls) and not all(urls):
        raise InvalidRequest(
            "One model is a server and one a folder.", "Name two servers or two folders."
        )
    return all(urls)


def mixture_changes(
    target_top_p: float | None, alpha_rule: str | None, stop_id: str | None
) -> dict[str, Any]:
    """Changes to a preset's parameters, of the options that are given.

    Raises:
        InvalidRequest: an unknown rule.
    """
    changes: dict[str, Any] = {}
    if target_top_p is not None:
        changes |= {"constraint_to_target": True, "target_top_p": target_top_p}
    if alpha_rule is not None:
        changes["alpha_rule"] = parse_rule(alpha_rule)
    if stop_id is not None:
        changes["stop_id"] = stop_id
    return changes


def parse_speculation(text: str) -> SpeculationOption:
    """The option that a text means: auto, off or a number of drafts per round.

    Raises:
        InvalidRequest: any other text, or a number out of range.
    """
    option: Any = int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text
    require_speculation(option)
    return option  # type: ignore[no-any-return]


def parse_engine_args(
    common: Mapping[str, Any],
    both: Sequence[str] | None,
    base: Sequence[str] | None,
    teacher: Sequence[str] | None,
) -> dict[str, Any]:
    """vLLM's options as keywords of `Pair.vllm`.

    Args:
        common: of options that have a name of their own on the command line; None for those that are not given.
        both, base, teacher: NAME=VALUE texts for both sides, and for one alone.

    Raises:
        InvalidRequest: a text without a name or value, or an option that is given twice.
    """
    found = {name: value for name, value in common.items() if value is not None}
    for name, value in _named_values("--engine-arg", both):
        if name in found:
            raise InvalidRequest(f"{name} is given twice.", "Give it once for both models.")
        if name in OWN_OPTIONS:
            raise InvalidRequest(
                f"--engine-arg cannot set {name}, which is no option of vLLM's alone.",
                "The command has an option for it: see --help.",
            )
        found[name] = value
    for option, texts in (("base", base), ("teacher", teacher)):
        if own := dict(_named_values(f"--{option}-arg", texts)):
            found[f"{option}_args"] = own
    return found


def _named_values(option: str, texts: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """The names and values of NAME=VALUE texts; a value that is no JSON is text."""
    names: set[str] = set()
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidRequest(f"{option} is {text!r}.", "Write it as quantization=fp8.")
        if name in names:
            raise InvalidRequest(f"{name} is given twice by {option}.", "Give it once.")
        names.add(name)
        try:
            yield name, orjson.loads(value)
        except orjson.JSONDecodeError:
            yield name, value


def _refuse_engine_args(given: Mapping[str, Any], on_servers: bool) -> NoReturn:
    """Refuses options of vLLM where another engine runs.

    Raises:
        InvalidRequest: always.
    """
    name = next(iter(given))
    option = f"--{name.replace('_args', '_arg').replace('_', '-')}"
    said = f"{option if name in OWN_OPTIONS else name} is an option of vLLM in this process"
    side = name.removesuffix("_lora")
    if on_servers and name != side:
        raise InvalidRequest(
            f"{said}, and two servers are named.",
            f"Serve the adapter (vllm serve --lora-modules), and give its name as --{side}-model.",
        )
    if on_servers:
        raise InvalidRequest(f"{said}, and two servers are named.", "Give it to the servers.")
    raise InvalidRequest(
        f"{said}, and the engine is local.", "Give --engine vllm, or leave it out."
    )


def parse_template_kwargs(
    text: str | None, base_text: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of the chat templates of (base, teacher), from JSON objects: for both sides, and for the base instead.

    Raises:
        InvalidRequest: not a JSON object, or variables that cannot be honoured.
    """
    both = _template_kwargs("--chat-template-kwargs", text)
    return _template_kwargs(
        "--base-chat-template-kwargs", base_text
    ) if base_text is not None else both, both


def _template_kwargs(option: str, text: str | None) -> dict[str, Any]:
    try:
        given = {} if text is None else orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"{option} is not JSON: {error}.", 'Write {"enable_thinking": false}.'
        ) from None
    return template_variables(given)


def quiet_transformers() -> None:
    """Keeps progress bars and advice of transformers off the terminal."""
    logging = require("transformers.utils.logging", "local")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
