"""Prompts as users write them, turned into token ids for each side; knows forms and checks, no model weights."""

from __future__ import annotations

from collections.abc import Sequence

from midlogit.checkpoint import Message, Model
from midlogit.errors import InvalidRequest, PromptTooLong

Prompt = str | Sequence[Message] | Sequence[int]


def encode_prompt(prompt: Prompt, checkpoint: Model, *, chat: bool, side: str, number: int | None) -> list[int]:
    """Token ids of one prompt for one side.

    Args:
        prompt: text, chat messages (dicts with role and content), or token ids.
        chat: wrap text as one user message.
        side, number: named in errors; the number only where it is one.

    Raises:
        InvalidRequest: empty, of no known form, or ids out of range.
        PromptTooLong: no room for a token in the context window.
    """
    where = f"{side} prompt" if number is None else f"{side} prompt {number}"
    forms = "Give text, chat messages or token ids."
    if not isinstance(prompt, Sequence):
        raise InvalidRequest(f"The {where} is of no known form.", forms)
    if not prompt:
        raise InvalidRequest(f"The {where} is empty.", forms)
    if isinstance(prompt, str):
        if not _is_unicode(prompt):
            raise InvalidRequest(f"The {where} holds lone surrogates, which no UTF-8 has.", "Decode its bytes anew.")
        ids = checkpoint.encode_chat([{"role": "user", "content": prompt}]) if chat else checkpoint.encode(prompt)
    elif all(isinstance(part, dict) for part in prompt):
        for message in prompt:
            if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
                raise InvalidRequest(f"A message of the {where} lacks a role or content.")
        ids = checkpoint.encode_chat([dict(m) for m in prompt if isinstance(m, dict)])
    elif all(isinstance(part, int) for part in prompt):
        ids = [int(part) for part in prompt if isinstance(part, int)]
        if not 0 <= min(ids) <= max(ids) < checkpoint.logit_size:
            raise InvalidRequest(f"The {where} holds ids outside 0 to {checkpoint.logit_size - 1}.")
    else:
        raise InvalidRequest(f"The {where} is of no known form.", forms)
    if not ids:
        raise InvalidRequest(f"The {where} has no tokens.", "Give a longer prompt.")
    if len(ids) >= checkpoint.max_context:
        raise PromptTooLong(
            f"The {where} has {len(ids)} tokens, the {side}'s context window {checkpoint.max_context}.",
            "Shorten it: at least one token must fit behind it.",
        )
    return ids


def _is_unicode(text: str) -> bool:
    """Whether a text is one of Unicode characters: bytes that were decoded by "surrogateescape" are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pair_up(
    prompts: Sequence[Prompt] | None,
    base_prompts: Sequence[Prompt] | None,
    teacher_prompts: Sequence[Prompt] | None,
) -> list[tuple[Prompt, Prompt]]:
    """(base prompt, teacher prompt) for each request: the same for both, or one list a side.

    Raises:
        InvalidRequest: none given, or lists of different length.
    """
    base = base_prompts if base_prompts is not None else prompts
    teacher = teacher_prompts if teacher_prompts is not None else prompts
    if base is None or teacher is None:
        raise InvalidRequest("There is no prompt for one side.", "Give prompts, or base_prompts with teacher_prompts.")
    if isinstance(base, str) or isinstance(teacher, str):
        raise InvalidRequest("Prompts must come as a list.", "Put the text in [ ].")
    if len(base) != len(teacher):
        raise InvalidRequest(f"There are {len(base)} base prompts and {len(teacher)} teacher prompts.", "Give as many.")
    if not base:
        raise InvalidRequest("There are no prompts.", "Give at least one.")
    return list(zip(base, teacher, strict=True))
