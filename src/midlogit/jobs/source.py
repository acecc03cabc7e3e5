"""Where a job's pair comes from: models and engine by name, so that any process can open it; knows no rows.

`facts` are what tokens at a seed depend on; devices, sizes of batches and addresses of servers are not among them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from midlogit.engines.http.upstream import Upstream
from midlogit.models.checkpoint import Checkpoint, Model, files_of, open_checkpoints
from midlogit.models.mixing import Mixing
from midlogit.models.weights import at_revision
from midlogit.pair import Pair

SERVED_DRAFTS = 4  # per round over HTTP, where nothing else is asked for
SAMPLED_BYTES = 1 << 20  # of the beginning and the end of a file of weights
# Options of vLLM that tokens do not depend on; of a revision there are digests.
NO_FACTS = {
    "block_size",
    "enable_prefix_caching",
    "enforce_eager",
    "max_num_batched_tokens",
    "revision",
    "weight_transfer_config",
}
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class PairSource:
    """Two models and the engine that runs them.

    Attributes:
        engine: which of `Pair.local`, `Pair.vllm` and `Pair.http` opens the pair.
        base, teacher: as that takes them; None for the bundled pair.
        options: its further keywords.
    """

    engine: Literal["local", "vllm", "http"] = "local"
    base: str | Path | Sequence[str] | Upstream | None = None
    teacher: str | Path | Sequence[str] | Upstream | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self, *, seeded: bool = True) -> Pair:
        """Opens the pair.

        Args:
            seeded: every request has a seed, as in a job. Over HTTP the number of drafts is then fixed, because tokens
                at a seed depend on it, and "auto" would draft none.

        Raises:
            MidlogitError: as the opener.
        """
        options = dict(self.options)
        if seeded and self.engine == "http":
            options["speculation"] = self._fixed_drafts
        pair: Pair = getattr(Pair, self.engine)(self.base, self.teacher, **options)
        return pair

    @property
    def _fixed_drafts(self) -> int | str:
        """The number of drafts of requests with a seed over HTTP."""
        given: int | str = self.options.get("speculation", "auto")
        if given != "auto":
            return given
        return "off" if self.options.get("top_k") == "auto" else SERVED_DRAFTS

    def _revision(self, side: str) -> str | None:
        """Which revision of a hub id vLLM runs; None for the newest."""
        own = self.options.get(f"{side}_args") or {}
        revision: str | None = own.get("revision", self.options.get("revision"))
        return revision

    def _adapter_facts(self, side: str) -> dict[str, Any]:
        """Digests of the files of a side's LoRA adapter, where it has one."""
        lora = self.options.get(f"{side}_lora")
        if lora is None:
            return {}
        folder = Path(lora).expanduser()
        config = folder / "adapter_config.json"
        return {
            "lora": _weights_of(folder),
            "lora_config": _digest(config.read_bytes()) if config.is_file() else None,
        }

    @property
    def _engine_args(self) -> dict[str, Any]:
        """vLLM's own options that tokens depend on, as JSON data, those of one side by its name."""
        if self.engine != "vllm":
            return {}
        own = inspect.signature(Pair.vllm).parameters.keys() | NO_FACTS
        found = {name: value for name, value in self.options.items() if name not in own}
        for side in ("base", "teacher"):
            given = self.options.get(f"{side}_args") or {}
            found |= {f"{side}.{name}": given[name] for name in given.keys() - NO_FACTS}
        return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]

    @contextmanager
    def mixing(self) -> Iterator[Mixing]:
        """The two models without their weights, for the duration of the block.

        Raises:
            ModelUnavailable, PairMismatch, InvalidRequest: they cannot be mixed.
        """
        if self.engine != "http":
            mixing = Mixing(
                *open_checkpoints(
                    at_revision(self.base, self._revision("base")),  # type: ignore[arg-type]
                    at_revision(self.teacher, self._revision("teacher")),  # type: ignore[arg-type]
                    self.options.get("chat_template"),
                    trust_remote_code=self.options.get("trust_remote_code", False),
                )
            )
            mixing.require_mixable()
            yield mixing
            return

        from midlogit.engines.http.opening import handshake

        base, teacher = (
            side if isinstance(side, Upstream) else Upstream(side)  # type: ignore[arg-type]
            for side in (self.base, self.teacher)
        )
        with handshake(base, teacher, self.options.get("top_k", 20)) as sides:
            mixing = Mixing(sides[0].model, sides[1].model)
            mixing.require_mixable()
            yield mixing

    def facts(self, mixing: Mixing) -> dict[str, Any]:
        """What tokens at a seed depend on: the engine and its precision, and both models by digests of their files."""
        facts: dict[str, Any] = {"engine": self.engine}
        if self.engine == "http":
            facts |= {"top_k": self.options.get("top_k", 20), "speculation": self._fixed_drafts}
        else:
            facts["dtype"] = self.options.get("dtype", "auto")
        if options := self._engine_args:
            facts["engine_args"] = options
        return {
            **facts,
            "base": _facts_of(mixing.base, self.base) | self._adapter_facts("base"),
            "teacher": _facts_of(mixing.teacher, self.teacher) | self._adapter_facts("teacher"),
        }


def _facts_of(model: Model, given: Any) -> dict[str, Any]:
    """What is known of a model: digests of its configuration, tokenizer, template and weights, or its served name."""
    files = files_of(model)
    facts: dict[str, Any] = {"context": model.max_context}
    if isinstance(given, Upstream) and given.model is not None:
        facts["served_as"] = given.model
    if files is None:
        return facts | {"served_as": model.name}
    return facts | {
        "config": _digest(json.dumps(_config_of(files), sort_keys=True, default=str).encode()),
        **tokenizer_facts(files),
        "chat_template_name": files.template_name,
        "weights": _weights_of(Path(files.name)) if not isinstance(given, Upstream) else None,
    }


def tokenizer_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of a model's tokenizer and chat template."""
    return {
        "tokenizer": _digest(checkpoint.tokenizer.backend_tokenizer.to_str().encode()),
        "chat_template": _digest(str(checkpoint.tokenizer.chat_template).encode()),
    }


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    config = dict(checkpoint.config.to_dict())
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    return config


def _weights_of(folder: Path) -> str | None:
    """A digest of the names, sizes, beginnings and ends of a folder's files of weights; None for a hub id."""
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    if not files:
        return None

    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(size - SAMPLED_BYTES, 0))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
