"""Prompts as users write them, turned into token ids for each side; knows forms and checks, no model weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from midlogit.errors import InvalidRequest, PromptTooLong
from midlogit.messages import Message, TemplateOptions, is_unicode, of_each_side, plain_messages
from midlogit.models.checkpoint import Model

Prompt = str | Sequence[Message] | Sequence[int]  # or any one-dimensional array of integers

FORMS = "Give text, chat messages or token ids."


@dataclass(frozen=True, slots=True)
class Reading:
    """Options for reading the prompts of a call.

    Attributes:
        chat: text is one user message.
        chat_template_kwargs: variables of the chat templates: one mapping for both sides, or (base's, teacher's).
        add_special_tokens: plain text is encoded with what the tokenizer itself adds, such as BOS.
    """

    chat: bool = False
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the prompts of a call for one side.

    Attributes:
        side: named in errors. variables: of its chat template. min_new_tokens: tokens that must fit after a prompt.
    """

    side: str
    model: Model
    reading: Reading
    variables: Mapping[str, Any]
    min_new_tokens: int

    def read(self, prompt: Prompt, number: int | None) -> list[int]:
        """Token ids of one prompt.

        Args:
            prompt: text, chat messages (dicts with role and content), or token ids.
            number: named in errors, where it is one.

        Raises:
            InvalidRequest: empty, of no known form, or ids out of range.
            PromptTooLong: the prompt and `min_new_tokens` do not fit the context window.
        """
        where = f"{self.side} prompt" if number is None else f"{self.side} prompt {number}"
        most = self.model.max_context - self.min_new_tokens
        hint = "Shorten it" + (
            ": at least one token must fit after it." if self.min_new_tokens else "."
        )

        self.require_form(prompt, number)
        try:
            ids = self._ids(prompt, where, most)
        except PromptTooLong as error:
            window = f"the {self.side}'s context window is {self.model.max_context}"
            raise PromptTooLong(f"The {where} {error.args[0]}; {window}.", hint) from None

        if not ids:
            raise InvalidRequest(f"The {where} has no tokens.", "Give a longer prompt.")
        if len(ids) > most:
            window = f"the {self.side}'s context window {self.model.max_context}"
            raise PromptTooLong(f"The {where} has {len(ids)} tokens, {window}.", hint)
        return ids

    def uses_template(self, prompt: Prompt) -> bool:
        """Whether the prompt is chat messages, or text that becomes one."""
        return self.reading.chat if isinstance(prompt, str) else _are_messages(prompt)

    def require_form(self, prompt: Any, number: int | None = None) -> None:
        """Refuses a prompt of no known form; tokenizes nothing.

        Raises:
            InvalidRequest: empty, of no known form, or ids out of range.
        """
        where = f"{self.side} prompt" if number is None else f"{self.side} prompt {number}"
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
            raise InvalidRequest(f"The {where} is of no known form.", FORMS)
        if not prompt:
            raise InvalidRequest(f"The {where} is empty.", FORMS)

        if isinstance(prompt, str) and not is_unicode(prompt):
            raise InvalidRequest(
                f"The {where} holds lone surrogates, which no UTF-8 has.", "Decode its bytes anew."
            )
        if isinstance(prompt, str):
            return
        if _are_messages(prompt):
            plain_messages(prompt, where)
            return

        kinds = set(map(type, prompt))
        if not all(issubclass(kind, int) and kind is not bool for kind in kinds):
            raise InvalidRequest(f"The {where} is of no known form.", FORMS)
        if not 0 <= min(prompt) <= max(prompt) < self.model.logit_size:
            raise InvalidRequest(f"The {where} holds ids outside 0 to {self.model.logit_size - 1}.")

    def _ids(self, prompt: Any, where: str, most: int) -> list[int]:
        """Ids of a prompt of a known form."""
        if isinstance(prompt, str) and not self.reading.chat:
            return self.model.encode(
                prompt, add_special_tokens=self.reading.add_special_tokens, most=most
            )
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if _are_messages(prompt):
            return self.model.encode_chat(plain_messages(prompt, where), self.variables, most=most)
        return list(prompt)


def readers(
    models: tuple[Model, Model], reading: Reading, *, min_new_tokens: int
) -> tuple[Reader, Reader]:
    """Makes the readers of (base, teacher).

    Args:
        min_new_tokens: tokens that must fit after a prompt.

    Raises:
        InvalidRequest: template variables that cannot be honoured.
    """
    base, teacher = of_each_side(reading.chat_template_kwargs)
    return Reader("base", models[0], reading, base, min_new_tokens), Reader(
        "teacher", models[1], reading, teacher, min_new_tokens
    )


def require_chat(both: tuple[Reader, Reader], pairs: Sequence[tuple[Prompt, Prompt]]) -> None:
    """Refuses template variables that no prompt of the call would get.

    Raises:
        InvalidRequest: there are some, and no prompt of their side goes through a template.
    """
    require_variables_used(
        both,
        used=any(
            bool(reader.variables) and reader.uses_template(prompt)
            for pair in pairs
            for reader, prompt in zip(both, pair, strict=True)
        ),
    )


def require_variables_used(both: tuple[Reader, Reader], *, used: bool) -> None:
    """Refuses template variables that are not used.

    Raises:
        InvalidRequest: a reader has some, and no prompt of its side goes through a template.
    """
    if not used and any(reader.variables for reader in both):
        raise InvalidRequest(
            "chat_template_kwargs is given, and no prompt is a chat.",
            "Give messages, or chat=True.",
        )


def plain_prompt(prompt: Any) -> Any:
    """The prompt with arrays and numbers of numpy, torch and the like as Python's own."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple) and any(
        hasattr(kind, "tolist") for kind in set(map(type, prompt))
    ):
        return [part.tolist() if hasattr(part, "tolist") else part for part in prompt]
    return prompt


def pair_up(
    prompts: Iterable[Prompt] | None,
    base_prompts: Iterable[Prompt] | None,
    teacher_prompts: Iterable[Prompt] | None,
) -> list[tuple[Prompt, Prompt]]:
    """(base prompt, teacher prompt) for each request: the same for both, or one list per side.

    Raises:
        InvalidRequest: none given, or lists of different length.
    """
    base, teacher = _of_sides(prompts, base_prompts, teacher_prompts)
    if not isinstance(base, Sized) or not isinstance(teacher, Sized):
        raise InvalidRequest(
            "Prompts must come as a list.",
            "as_completed takes any iterable, and reads it bit by bit.",
        )
    if len(base) != len(teacher):
        raise InvalidRequest(
            f"There are {len(base)} base prompts and {len(teacher)} teacher prompts.",
            "Give as many.",
        )
    if not len(base):
        raise InvalidRequest("There are no prompts.", "Give at least one.")
    return [
        (plain_prompt(own), plain_prompt(prompt)) for own, prompt in zip(base, teacher, strict=True)
    ]


def pair_up_lazily(
    prompts: Iterable[Prompt] | None,
    base_prompts: Iterable[Prompt] | None,
    teacher_prompts: Iterable[Prompt] | None,
) -> Iterator[tuple[Prompt, Prompt]]:
    """`pair_up` of iterables that are read as the pairs are asked for, and not kept.

    Raises:
        InvalidRequest: none given; or at the end of the shorter one, where they differ in length.
    """
    base, teacher = _of_sides(prompts, base_prompts, teacher_prompts)
    if base is teacher:
        return ((prompt, prompt) for prompt in map(plain_prompt, base))
    both = zip_equal("base_prompts and teacher_prompts", base, teacher)
    return ((plain_prompt(own), plain_prompt(prompt)) for own, prompt in both)


def zip_equal(names: str, *columns: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Rows of columns that must be of one length.

    Args:
        names: of the columns, for the error.

    Raises:
        InvalidRequest: at the end of the shortest, where they are not.
    """
    missing = object()
    for row in zip_longest(*columns, fillvalue=missing):
        if any(value is missing for value in row):
            raise InvalidRequest(f"{names} differ in number.", "Give as many of each.")
        yield row


def _of_sides(
    prompts: Iterable[Prompt] | None,
    base_prompts: Iterable[Prompt] | None,
    teacher_prompts: Iterable[Prompt] | None,
) -> tuple[Iterable[Prompt], Iterable[Prompt]]:
    """The prompts of base and teacher.

    Raises:
        InvalidRequest: none for one side, or a text in place of a list.
    """
    base = base_prompts if base_prompts is not None else prompts
    teacher = teacher_prompts if teacher_prompts is not None else prompts

    if base is None or teacher is None:
        raise InvalidRequest(
            "There is no prompt for one side.",
            "Give prompts, or base_prompts with teacher_prompts.",
        )
    if isinstance(base, str) or isinstance(teacher, str):
        raise InvalidRequest("Prompts must come as a list.", "Put the text in [ ].")
    return base, teacher


def _are_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and all(isinstance(part, Mapping) for part in prompt)
