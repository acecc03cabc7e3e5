"""The files of a model folder or hub id as transformers reads them: configuration, tokenizer, stop ids.

Knows what a file may not ask for: code of its own, files elsewhere, sizes that never end. Loads no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from midlogit.errors import MidlogitError, ModelUnavailable, first_line

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
COUNTED = re.compile(r"(layers?|experts|labels)$")  # what objects are made for, one by one
MOST_COUNTED = 65_536
ATTENTION = ("attn_implementation", "_attn_implementation")
TRUST = "Give --trust-remote-code or trust_remote_code=True if you trust it."


def open_config(name: str, *, trust_remote_code: bool) -> Any:
    """transformers' configuration of a causal language model.

    Raises:
        ModelUnavailable: it cannot be read, is of another kind, or asks for what it may not.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    require_plain_folder(name)
    with naming("config.json", name):
        given, _ = PreTrainedConfig.get_config_dict(name)
        require_modest(given, f"The config.json of {name}", trusted=trust_remote_code)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise _named_code(given, name, trust_remote_code) or error from error

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or [
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
    ]
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ModelUnavailable(f"The config.json of {name} names no architectures.")
    if "AutoModelForCausalLM" in (given.get("auto_map") or {}):
        if trust_remote_code:
            return config
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise _needs_code(name)
    if not causal & set(architectures):
        shown = " ".join(", ".join(architectures).split())
        raise ModelUnavailable(f"{name} is not a causal language model ({shown:.200}).")
    return config


def open_tokenizer(name: str, *, trust_remote_code: bool) -> Any:
    """transformers' tokenizer, backed by the tokenizers library.

    Raises:
        ModelUnavailable: a file that cannot be read; names it.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with naming(_tokenizer_file, name):
        given = get_tokenizer_config(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise _named_code(given, name, trust_remote_code) or error from error
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ModelUnavailable(
                f"{name} has no tokenizer.json that the tokenizers library can read."
            )
        tokenizer("a", add_special_tokens=True)  # a damaged one may fail at its first text
    _require_one_token_each(name, tokenizer.backend_tokenizer)
    return tokenizer


def _require_one_token_each(name: str, tokenizer: Any) -> None:
    """Checks that no id is that of two tokens: which of them it becomes would differ from run to run.

    Raises:
        ModelUnavailable: names both.
    """
    tokens: dict[int, str] = {}
    for token, token_id in sorted(tokenizer.get_vocab(with_added_tokens=False).items()):
        if token_id in tokens:
            raise ModelUnavailable(
                f"The tokenizer.json of {name} gives the id {token_id} to {tokens[token_id]!r} and {token!r}."
            )
        tokens[token_id] = token


def open_stop_ids(name: str, config: Any) -> Any:
    """eos_token_id of the generation configuration, else of the configuration.

    Raises:
        ModelUnavailable: generation_config.json cannot be read.
    """
    from transformers import GenerationConfig

    with naming("generation_config.json", name):
        try:
            return GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:
            if (Path(name) / "generation_config.json").exists():
                raise
            return config.get_text_config().eos_token_id


def require_plain_folder(name: str) -> None:
    """Refuses a folder in which transformers would load more than the model.

    Raises:
        ModelUnavailable: it holds an adapter of another model.
    """
    if (Path(name) / "adapter_config.json").exists():
        raise ModelUnavailable(
            f"{name} holds an adapter (adapter_config.json).",
            "Merge it into the weights, or give it to vLLM beside its model: base_lora, --base-lora.",
        )


def require_modest(config: Mapping[str, Any], subject: str, *, trusted: bool) -> None:
    """Refuses a configuration that names code or files elsewhere, or sizes that would never end.

    Raises:
        ModelUnavailable: says which field.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            require_modest(value, subject, trusted=trusted)
        if name == "transformers_weights" and value is not None:
            raise ModelUnavailable(f"{subject} names other weights: {value!r:.80}.", "Remove it.")
        if name in ATTENTION and "/" in str(value) and not trusted:
            raise ModelUnavailable(f"{subject} names code to run: {value!r:.80}.", TRUST)
        if isinstance(value, int) and COUNTED.search(name) and value > MOST_COUNTED:
            raise ModelUnavailable(f"{subject} has {name} {value}.", f"At most {MOST_COUNTED}.")


@contextmanager
def naming(what: str | Callable[[Path], str], name: str) -> Iterator[None]:
    """Turns whatever a reader of damaged files raises into one error that names the file.

    Args:
        what: the file, or a function that finds the damaged one in a folder.

    Raises:
        ModelUnavailable: for any error of the block.
    """
    try:
        yield
    except MidlogitError:
        raise
    except BaseException as error:
        # The tokenizers library panics on some files; that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        file = what if isinstance(what, str) else what(Path(name))
        said = _damage(Path(name)) or f"{file}: {first_line(error)}"
        raise ModelUnavailable(f"{name} cannot be opened: {said}") from error


def _damage(folder: Path) -> str | None:
    """The first file of a folder that holds no JSON object, and what it holds."""
    for file in JSON_FILES:
        if not (folder / file).exists():
            continue
        try:
            content = json.loads((folder / file).read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            return f"{file} is not JSON: {first_line(error)}"
        if not isinstance(content, dict):
            return f"{file} holds no JSON object"
    return None


def _tokenizer_file(folder: Path) -> str:
    """Which of the tokenizer's files is damaged."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if folder.is_dir() and not file.exists():
        return "there is no tokenizer.json"
    try:
        Tokenizer.from_file(str(file))
    except BaseException:  # a panic of the tokenizers library is no Exception
        return file.name
    return "tokenizer_config.json"


def _named_code(
    given: Mapping[str, Any], name: str, trust_remote_code: bool
) -> ModelUnavailable | None:
    """The error for a model that needs code of its own, where that is what failed."""
    return _needs_code(name) if given.get("auto_map") and not trust_remote_code else None


def _needs_code(name: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{name} needs Python code that comes with it, which is not run.", TRUST
    )
