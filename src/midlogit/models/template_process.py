"""A program of its own that renders chat templates, one line of JSON in and one out; knows no model and no midlogit.

A template comes with a model and is a program: it may loop forever or ask for all memory. Here it has none to take
but this process's own, which its parent ends when a template takes too long. Environment and sandbox are those of
transformers, which runs templates inside the caller.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space
SHOWN = 500  # characters of an error


class Generation(jinja2.ext.Extension):
    """The tag `generation`, by which some templates mark what the assistant writes: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")
        super().__setitem__(name, value)


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes of HTML that jinja2's own filter writes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": make_dict,
        "namespace": Namespace,
    }
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any], most: int) -> str:
    """The text of a template.

    Raises:
        ValueError: more than `most` characters.
    """
    pieces, size = [], 0
    for piece in compiled(template).generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise ValueError(f"it writes more than {most:,} characters")
    return "".join(pieces)


def main() -> None:
    """Answers each line {template, variables, most} with {text} or {error}."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    for line in sys.stdin.buffer:
        try:
            answer = {"text": render(**json.loads(line))}
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY >> 20:,} MiB"}
        except Exception as error:  # a template is a program of its own, and can fail in any way
            said = " ".join(str(error).split()) or type(error).__name__
            answer = {"error": said[:SHOWN]}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
