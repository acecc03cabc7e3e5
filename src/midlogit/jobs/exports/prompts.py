"""Prompts as columns of exports: text, lists of messages or of token ids; knows no format.

A column of Parquet has one type, so the prompts of an export have one form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from midlogit.errors import InvalidRequest
from midlogit.jobs.exports.results import Results, no_completion
from midlogit.jobs.schema import prompt_of
from midlogit.messages import Message, plain_messages

if TYPE_CHECKING:
    import pyarrow as pa

Form = Literal["text", "messages", "token_ids"]
CALLED: dict[str, str] = {"text": "text", "messages": "messages", "token_ids": "token ids"}


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of one column of prompts.

    Attributes:
        form: text that becomes a user message counts as messages.
        are_named: whether some message has a name.
    """

    form: Form
    are_named: bool = False

    @property
    def type(self) -> pa.DataType:
        """The Arrow type of the column."""
        import pyarrow as pa

        if self.form == "text":
            return pa.string()
        if self.form == "token_ids":
            return pa.list_(pa.int32())
        names = ("role", "content", "name") if self.are_named else ("role", "content")
        return pa.list_(pa.struct([(name, pa.string()) for name in names]))


@dataclass(frozen=True, slots=True)
class Shapes:
    """The forms of both columns of prompts.

    Attributes:
        base: None where the base read the same prompts.
        had_text: whether some prompt is text that was sampled from as it is, and counts as a user message here.
    """

    prompt: Shape
    base: Shape | None
    had_text: bool


def survey(results: Results, *, as_chat: bool = False) -> Shapes:
    """Reads the prompts of all completions that were made, for their form.

    Args:
        as_chat: text counts as a user message, as the format has nothing else.

    Raises:
        InvalidRequest: there is no completion, or prompts are of several forms.
    """
    import pyarrow.compute as pc

    is_chat = as_chat or results.manifest.reading.chat
    had_text = False
    forms: dict[str, str] = {}
    named: dict[str, bool] = {}
    names = ["row_id", "prompt", "prompt_form", "base_prompt", "base_prompt_form", "error"]
    for table in results.read(names):
        good = table.filter(pc.is_null(table["error"]))
        for side in ("prompt", "base_prompt"):
            for row_id, text, form in zip(
                *(good[name].to_pylist() for name in ("row_id", side, f"{side}_form")), strict=True
            ):
                if form is None:
                    continue
                if form == "text" and is_chat:
                    form, had_text = "messages", not results.manifest.reading.chat
                first = forms.setdefault(side, form)
                if form != first:
                    raise InvalidRequest(
                        f"The {side.replace('_', ' ')} of row {row_id!r} is {CALLED[form]},"
                        f" and that of rows before it is {CALLED[first]}.",
                        "Export jsonl, which takes any.",
                    )
                named[side] = named.get(side, False) or (form == "messages" and '"name"' in text)

    if "prompt" not in forms:
        raise no_completion()
    shapes = {side: Shape(form, named[side]) for side, form in forms.items()}  # type: ignore[arg-type]
    return Shapes(shapes["prompt"], shapes.get("base_prompt"), had_text)


def require_text(shapes: Shapes, name: str) -> None:
    """Refuses token ids as prompts, for a format that has text or messages.

    Raises:
        InvalidRequest: names the format.
    """
    for shape in (shapes.prompt, shapes.base):
        if shape is not None and shape.form == "token_ids":
            raise InvalidRequest(
                f"The prompts are token ids, and {name} has text or messages.",
                "Export jsonl or datasets.",
            )


def prompt_array(table: pa.Table, shape: Shape, side: str = "prompt") -> pa.Array:
    """The prompts of a table as a column of `shape`; null where there is none."""
    import pyarrow as pa

    if shape.form == "text":
        return table[side]
    if shape.form == "messages":
        return pa.array(messages(table, side), shape.type)
    prompts = map(prompt_of, table[side].to_pylist(), table[f"{side}_form"].to_pylist())
    return pa.array(list(prompts), shape.type)


def messages(table: pa.Table, side: str = "prompt") -> Iterator[list[Message] | None]:
    """The prompts of a table as messages whose contents are text; text as one user message."""
    last: tuple[str | None, str | None] = None, None
    plain: list[Message] | None = None
    for stored in zip(table[side].to_pylist(), table[f"{side}_form"].to_pylist(), strict=True):
        if stored != last:
            last, plain = stored, as_messages(*stored)
        yield plain


def as_messages(text: str | None, form: str | None) -> list[Message] | None:
    """A stored prompt as messages whose contents are text."""
    if text is None:
        return None
    if form == "text":
        return [{"role": "user", "content": text}]
    return plain_messages(json.loads(text), "the prompt")


def with_answers(table: pa.Table, shape: Shape) -> pa.Array:
    """Whole conversations: the messages of each prompt, and its completion as the assistant's."""
    import pyarrow as pa

    answers = ({"role": "assistant", "content": text} for text in table["text"].to_pylist())
    conversations: list[Any] = [
        [*(before or ()), answer] for before, answer in zip(messages(table), answers, strict=True)
    ]
    return pa.array(conversations, shape.type)


def answers(table: pa.Table) -> pa.Array:
    """The completions, each as a list of one message of the assistant."""
    import pyarrow as pa

    listed = [[{"role": "assistant", "content": text}] for text in table["text"].to_pylist()]
    return pa.array(listed, Shape("messages").type)
