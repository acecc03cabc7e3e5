"""A model that is loaded already, such as a trainer's, as a `Checkpoint`; knows its attributes, runs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from midlogit.errors import InvalidRequest, ModelUnavailable
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.files import open_tokenizer

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel


def causal_lm(module: Module) -> PreTrainedModel:
    """The transformers model of a module: itself, or the one that an adapter wraps.

    Raises:
        ModelUnavailable: there is none.
    """
    from transformers import PreTrainedModel

    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part.can_generate():
            return part
    raise ModelUnavailable(
        f"{type(module).__name__} is no causal language model of transformers.",
        "Give such a model, a PeftModel of one, or a model folder.",
    )


def checkpoint_of(
    module: Module, tokenizer: Any = None, template_name: str | None = None
) -> Checkpoint:
    """A loaded model as its configuration, generation configuration and tokenizer describe it.

    Args:
        tokenizer: transformers' tokenizer; by default that of the folder that the model was loaded from.

    Raises:
        ModelUnavailable: no model of transformers, or a tokenizer that the tokenizers library cannot read.
        InvalidRequest: no tokenizer is given, and none is where the model came from.
    """
    model = causal_lm(module)
    came_from = str(model.config._name_or_path)
    if tokenizer is None:
        tokenizer = _tokenizer_in(came_from)

    generation = model.generation_config
    stop = model.config.get_text_config().eos_token_id
    if generation is not None and generation.eos_token_id is not None:
        stop = generation.eos_token_id
    name = came_from or type(model).__name__
    return Checkpoint.of(name, model.config, tokenizer, stop, template_name)


def _tokenizer_in(name: str) -> Any:
    """The tokenizer of the folder or hub id that a module was loaded from, "" for none."""
    hint = "Give it: Pair.local(..., base_tokenizer=, teacher_tokenizer=)."
    if not name:
        raise InvalidRequest("A module that was loaded from no folder has no tokenizer.", hint)
    try:
        return open_tokenizer(name, trust_remote_code=False)
    except ModelUnavailable as error:  # the folder may be gone
        raise InvalidRequest(f"The tokenizer of {error.args[0]}", hint) from error
