"""Chat messages and template variables as users and clients send them, made plain for chat templates.

Knows roles, content parts and the values that ask for nothing; no template, no tokenizer and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from midlogit.errors import InvalidField, InvalidRequest

Message = dict[str, Any]
TemplateVariables = Mapping[str, Any]
TemplateOptions = TemplateVariables | tuple[TemplateVariables | None, TemplateVariables | None]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TOOL_ROLES = ("tool", "function")
TEXT_PARTS = ("text", "input_text", "output_text")

ANY: tuple[Any, ...] = (object(),)
Harmless = Mapping[str, tuple[Any, ...]]
# Fields that midlogit has no use for, with the values that ask for nothing; ANY value asks for nothing.
OF_MESSAGES: Harmless = {
    "type": ("text", "message"),
    "id": ANY,
    "status": ANY,
    "tool_calls": ([],),
    "function_call": ({},),
    "tool_call_id": ("",),
    "name": ("",),
    "refusal": ("",),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "annotations": ([],),
    "audio": ({},),
    "images": ([],),
    "prefix": (False,),
    "partial": (False,),
    "cache_control": ANY,
}
OF_PARTS: Harmless = {
    "annotations": ([],),
    "logprobs": ([],),
    "cache_control": ANY,
    "prompt_cache_breakpoint": ANY,
}
OF_TEMPLATES: Harmless = {
    "tokenize": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "sanitize_control_tokens": (False,),
    "padding": (False,),
    "truncation": (False,),
    "max_length": (),
    "return_tensors": (),
    "return_dict": ANY,
    "return_assistant_tokens_mask": (False,),
    "tokenizer_kwargs": ({},),
    "chat_template": (),
    "conversation": (),
    "messages": (),
}


def asks_for_nothing(name: str, value: Any, harmless: Harmless) -> bool:
    """Whether a field that is not known can be left out; nulls inside the value say nothing."""
    if value is None:
        return True
    if name not in harmless:
        return False
    return harmless[name] is ANY or any(_says(value, nothing) for nothing in harmless[name])


def plain_messages(messages: Iterable[Any], where: str) -> list[Message]:
    """Messages as chat templates read them: a role, the content as one text, the name if there is one.

    Args:
        messages: as OpenAI's and vLLM's clients send them. where: named in errors.

    Raises:
        InvalidField: a message of no known form, or one that asks for what midlogit cannot do.
    """
    return [
        plain_message(message, f"message {n} of the {where}") for n, message in enumerate(messages)
    ]


def plain_message(message: Any, where: str = "the message") -> Message:
    """One message of `plain_messages`."""
    subject = where[0].upper() + where[1:]
    if not isinstance(message, Mapping):
        raise InvalidField(
            f"{subject} is of no known form.", "Give an object with role and content."
        )
    if message.get("role") is None or "content" not in message:
        raise InvalidField(f"{subject} lacks a role or content.")

    role = message["role"]
    if role in TOOL_ROLES:
        raise InvalidField(
            f"{subject} has the role {role!r}.",
            "midlogit calls no tools.",
            "role",
            unsupported=True,
        )
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidField(
            f"{subject} has the role {role!r:.80}.", f"Use {', '.join(ROLES)}.", "role"
        )
    plain = {"role": ROLES[role], "content": _text_of(message["content"], where)}

    for name, value in message.items():
        if name in ("role", "content") or asks_for_nothing(name, value, OF_MESSAGES):
            continue
        if name != "name":
            raise _unsupported(f"{name!r:.80} of {where}", str(name))
        if not isinstance(value, str):
            raise InvalidField(f"The name in {where} is no text.", field="name")
        plain["name"] = value
    return plain


def _text_of(content: Any, where: str) -> str:
    """The text of a content: a text, or parts that are joined; null is an empty one."""
    if isinstance(content, list | tuple):
        content = "".join(
            _text_of_part(part, f"content.{n}", where) for n, part in enumerate(content)
        )
    if not isinstance(content, str | None):
        raise InvalidField(
            f"The content of {where} is no text.", "Give text or text parts.", "content"
        )
    if content and not is_unicode(content):
        raise InvalidField(
            f"The content of {where} holds lone surrogates.", "Decode its bytes anew.", "content"
        )
    return content or ""


def _text_of_part(part: Any, field: str, where: str) -> str:
    if part is None or isinstance(part, str):
        return part or ""
    subject = f"Part {field.removeprefix('content.')} of {where}"
    if not isinstance(part, Mapping):
        raise InvalidField(f"{subject} is of no known form.", "Give a text part.", field)

    kind = part.get("type") or "text"
    if kind not in TEXT_PARTS:
        hint = "Both models read text alone: leave other parts out."
        raise InvalidField(f"{subject} is of type {kind!r:.80}.", hint, f"{field}.type")
    if "text" not in part or not isinstance(part["text"], str | None):
        raise InvalidField(f"{subject} has no text.", field=f"{field}.text")

    for name, value in part.items():
        if name not in ("type", "text") and not asks_for_nothing(name, value, OF_PARTS):
            raise _unsupported(f"{name!r:.80} of {subject.lower()}", f"{field}.{name}")
    return part["text"] or ""


def template_variables(given: Any) -> dict[str, Any]:
    """The variables for a chat template, without those that ask for nothing.

    Raises:
        InvalidField: no mapping of names to values, or an argument that is not the template's.
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InvalidField(
            "chat_template_kwargs must map names to values.",
            'Give such as {"enable_thinking": false}.',
        )
    for name, value in given.items():
        if name in OF_TEMPLATES and not asks_for_nothing(name, value, OF_TEMPLATES):
            raise _unsupported(f"{name!r:.80} in chat_template_kwargs", name)
    return {
        name: value
        for name, value in given.items()
        if value is not None and name not in OF_TEMPLATES
    }


def of_each_side(given: TemplateOptions | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables for the templates of (base, teacher), from one mapping for both or one for each.

    Raises:
        InvalidRequest: as `template_variables`, or a tuple that is no pair.
    """
    if isinstance(given, tuple):
        if len(given) != 2:
            raise InvalidRequest(
                "chat_template_kwargs is no pair.", "Give one mapping, or one for (base, teacher)."
            )
        return template_variables(given[0] or {}), template_variables(given[1] or {})
    both = template_variables({} if given is None else given)
    return both, both


def is_unicode(text: str) -> bool:
    """Whether a text is one of Unicode characters: bytes that were decoded by "surrogateescape" are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unsupported(what: str, field: str) -> InvalidField:
    return InvalidField(f"midlogit cannot honour {what}.", "Leave it out.", field, unsupported=True)


def _says(value: Any, nothing: Any) -> bool:
    """Whether a value equals one that asks for nothing, but for nulls inside it; looks no deeper than that one."""
    if isinstance(value, Mapping) and isinstance(nothing, Mapping):
        said = {name: part for name, part in value.items() if part is not None}
        return said.keys() == nothing.keys() and all(
            _says(part, nothing[name]) for name, part in said.items()
        )
    if isinstance(value, list | tuple) and isinstance(nothing, list):
        parts = [part for part in value if part is not None]
        return len(parts) == len(nothing) and all(map(_says, parts, nothing))
    return bool(value == nothing)
