"""A model without its weights: the seam `Model`, and `Checkpoint` for a Hugging Face folder.

Knows transformers' configuration and tokenizer files; loads no torch model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from midlogit.errors import InvalidRequest, ModelUnavailable, PromptTooLong, first_line
from midlogit.extras import require
from midlogit.messages import Message
from midlogit.models.detokenize import Detokenizer, LocalDetokenizer
from midlogit.models.files import naming, open_config, open_stop_ids, open_tokenizer
from midlogit.models.templates import TemplateFailed, render
from midlogit.models.tokenization import Density, ids_before, undoubled

TemplateNames = (
    str | tuple[str | None, str | None] | None
)  # of both chat templates, or of (base, teacher)

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


class Model(Protocol):
    """A model, wherever it is, as far as mixing, prompts and text need to know it.

    `vocabulary` is None when only probes can tell whether two tokenizers agree.
    """

    @property
    def name(self) -> str: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def vocabulary(self) -> dict[int, str] | None: ...
    @property
    def logit_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def has_chat_template(self) -> bool: ...
    @property
    def detokenizer(self) -> Detokenizer: ...
    def encode(
        self, text: str, *, add_special_tokens: bool = True, most: int | None = None
    ) -> list[int]: ...
    def encode_chat(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        most: int | None = None,
    ) -> list[int]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A model as known before its weights are loaded.

    Attributes:
        name: the folder or hub id it was opened by.
        config: transformers' configuration of the text model.
        tokenizer: transformers' tokenizer, backed by the tokenizers library.
        generation_stop_ids: eos_token_id of the generation configuration, else of the configuration.
        logit_size: columns of the model's logits, padding included; where a server runs the model, its ids.
        max_context: most tokens of prompt and completion together that the engine allows.
        template_name: which of the tokenizer's named chat templates to use; None for its only or default one.
        trust_remote_code: whether code that comes with the model may be run.
    """

    name: str
    config: Any
    tokenizer: Any
    generation_stop_ids: tuple[int, ...]
    logit_size: int
    max_context: int
    template_name: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.template_name is not None and self.template_name not in self.template_names:
            known = ", ".join(self.template_names)
            raise InvalidRequest(
                f"{self.name} has no chat template named {self.template_name!r}.",
                f"It has {known}." if known else "Its templates have no names: leave it out.",
            )

    @classmethod
    def open(
        cls,
        name: str | Path,
        template_name: str | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> Checkpoint:
        """Reads a folder or hub id.

        Raises:
            ModelUnavailable: not there, unreadable, not a causal language model, or one that needs code of its own.
            InvalidRequest: no chat template of that name.
            MissingExtra: transformers is not installed.
        """
        require("transformers", "local")
        name = _folder_or_hub_id(str(name))
        config = open_config(name, trust_remote_code=trust_remote_code)
        tokenizer = open_tokenizer(name, trust_remote_code=trust_remote_code)
        opened = cls.of(name, config, tokenizer, open_stop_ids(name, config), template_name)
        return replace(opened, trust_remote_code=trust_remote_code)

    @classmethod
    def of(
        cls, name: str, config: Any, tokenizer: Any, stop: Any, template_name: str | None
    ) -> Checkpoint:
        """Of a model's configuration, tokenizer and eos_token_id.

        Raises:
            ModelUnavailable: a tokenizer or ids that cannot be used.
            InvalidRequest: no chat template of that name.
        """
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ModelUnavailable(
                f"{name} has no tokenizer.json that the tokenizers library can read."
            )
        text = config.get_text_config()
        with naming("config.json", name):
            size, max_context = int(text.vocab_size), _max_context(text)
        if size < 1 or max_context < 1:
            raise ModelUnavailable(
                f"The config.json of {name} has {size} ids and a context of {max_context} tokens."
            )
        ids = _as_ids(stop)
        if not all(type(i) is int and 0 <= i < size for i in ids):
            raise ModelUnavailable(
                f"{name} names {stop!r:.80} as its eos_token_id.",
                f"It must be an id from 0 to {size - 1}, or a list of ids.",
            )
        return cls(name, text, tokenizer, ids, size, max_context, template_name)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence for this model, ascending."""
        return tuple(sorted({*self.generation_stop_ids, *_as_ids(self.tokenizer.eos_token_id)}))

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """Id to token."""
        return {i: token for token, i in sorted(self.tokenizer.get_vocab().items())}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that the tokenizer marks as special."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {
            i for i, token in added.items() if token.special
        }

    @cached_property
    def detokenizer(self) -> Detokenizer:
        return LocalDetokenizer(self.tokenizer.backend_tokenizer)

    @property
    def unsupported_layers(self) -> set[str]:
        """Kinds of layers that the local engine's KV cache does not hold."""
        return set(getattr(self.config, "layer_types", None) or ()) - ATTENTION_LAYERS

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def template_names(self) -> tuple[str, ...]:
        """Names of the tokenizer's chat templates, where they have names."""
        templates = self.tokenizer.chat_template
        return tuple(templates) if isinstance(templates, dict) else ()

    @property
    def has_default_template(self) -> bool:
        """Whether chat needs no choice of a template."""
        return not self.template_names or (self.template_name or "default") in self.template_names

    @property
    def chat_template(self) -> str | None:
        """The chat template in use; None for a model without one.

        Raises:
            InvalidRequest: there are several, none is the default, and none is chosen; names them.
        """
        templates = self.tokenizer.chat_template
        if not self.template_names:
            return templates or None
        if not self.has_default_template:
            raise InvalidRequest(
                f"{self.name} has several chat templates and no default: {', '.join(templates)}.",
                "Choose one: Pair.local(..., chat_template=), --base-chat-template, --teacher-chat-template.",
            )
        return str(templates[self.template_name or "default"])

    def encode(
        self, text: str, *, add_special_tokens: bool = True, most: int | None = None
    ) -> list[int]:
        """Ids of plain text.

        Args:
            add_special_tokens: with what the tokenizer itself adds, such as a beginning-of-text id. A text that
                carries it already gets no second one.
            most: tokens that are of use; a text that has far more is not tokenized as a whole.

        Raises:
            PromptTooLong: more than `most` tokens, by the number of characters or by the tokens of a part.
        """
        if most is not None and len(text) > most and self._density is not None:
            fewest = self._density.fewest_tokens(text)
            if fewest > most:
                raise PromptTooLong(f"has {len(text)} characters, so at least {fewest} tokens")
        if most is not None:
            self._require_few_tokens(text, most)

        ids = self._ids(text, add_special_tokens)
        return undoubled(ids, self._ids_before) if add_special_tokens else ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        most: int | None = None,
    ) -> list[int]:
        """Ids of plain chat messages in the model's own template, ready for the answer.

        A model without a template gets `plain_chat`.

        Args:
            variables: of the template, besides the messages. most: as of `encode`.

        Raises:
            InvalidRequest: the template refuses the messages or goes beyond its limits, or there are several to
                choose from.
            PromptTooLong: as `encode`.
        """
        template = self.chat_template
        if template is None:
            return self.encode(plain_chat(messages), most=most)

        known = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self.tokenizer.special_tokens_map,
        }
        try:
            text = render(template, known | dict(variables or {}))
        except TemplateFailed as error:
            raise InvalidRequest(
                f"The chat template of {self.name} refuses the messages: {error}"
            ) from error
        return self.encode(text, add_special_tokens=False, most=most)

    @cached_property
    def _density(self) -> Density | None:
        return Density.of(self.tokenizer.backend_tokenizer)

    def _require_few_tokens(self, text: str, most: int) -> None:
        """Refuses a text whose parts have more than twice as many tokens as are of use.

        A tokenizer holds up the whole process while it hands over the ids of a text, and each part has few.

        Raises:
            PromptTooLong: so many tokens.
        """
        if len(text.encode(errors="replace")) <= 4 * most:
            return
        count = 0
        for start in range(0, len(text), most):
            count += len(self._ids(text[start : start + most], False))
            if count > 2 * most:
                raise PromptTooLong(f"has {len(text)} characters and more than {most} tokens")

    @cached_property
    def _ids_before(self) -> list[int]:
        return ids_before(self._ids)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _folder_or_hub_id(name: str) -> str:
    """The path of a model folder, or a hub id.

    Raises:
        ModelUnavailable: neither.
    """
    try:
        path = Path(name).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError) as error:  # no name of a file, or no such user's home
        raise ModelUnavailable(
            f"{name[:100]} is no name of a model: {first_line(error)}"
        ) from error

    hint = "Give a Hugging Face model folder or hub id."
    if is_there and not (path / "config.json").is_file():
        raise ModelUnavailable(f"{path} holds no config.json.", hint)
    if not is_there and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise ModelUnavailable(f"There is no model folder {name}.", hint)
    return str(path) if is_there else name


def files_of(model: Model) -> Checkpoint | None:
    """The tokenizer files of a model; None when they are not on this machine."""
    return model if isinstance(model, Checkpoint) else None


def bundled(side: str) -> Path:
    """The folder of the bundled model of a side, "base" or "teacher"."""
    return Path(str(files("midlogit") / "bundled" / side))


def open_checkpoints(
    base: str | Path | None,
    teacher: str | Path | None,
    chat_template: TemplateNames = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoints of a pair; the bundled one when neither is named.

    Raises:
        InvalidRequest: only one of the two is named, or a chat template that is not there.
        ModelUnavailable: a model that is not there or not a causal LM.
    """
    if (base is None) != (teacher is None):
        raise InvalidRequest(
            "Only one of base and teacher is named.", "Name both, or neither for the bundled pair."
        )

    names, trust = names_of_sides(chat_template), {"trust_remote_code": trust_remote_code}
    first = Checkpoint.open(bundled("base") if base is None else base, names[0], **trust)
    if base is not None and str(base) == str(teacher):
        return first, replace(first, template_name=names[1])
    second = bundled("teacher") if teacher is None else teacher
    return first, Checkpoint.open(second, names[1], **trust)


def names_of_sides(chat_template: TemplateNames) -> tuple[str | None, str | None]:
    """The names of the chat templates of (base, teacher); one name is that of both."""
    return chat_template if isinstance(chat_template, tuple) else (chat_template, chat_template)


def plain_chat(messages: Sequence[Message]) -> str:
    """Chat messages for a model that knows no chat: what a base model reads as a list of answers.

    System text comes first as it is, each user message as "Question: …", each answer as "Answer: …";
    the text ends with "Answer:".
    """
    names = {"user": "Question: ", "assistant": "Answer: "}
    lines = [
        names.get(m["role"], "") + m["content"] + ("\n" if m["role"] != "user" else "")
        for m in messages
    ]
    return "\n".join([*lines, "Answer:"])


def _max_context(config: Any) -> int:
    """Most tokens of prompt and completion together; a sliding window counts as the limit."""
    limit = int(getattr(config, "max_position_embeddings", 0) or 2048)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        limit = min(limit, int(config.sliding_window))
    return limit


def _as_ids(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
