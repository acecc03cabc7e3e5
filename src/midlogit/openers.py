"""The constructors of a pair: two models in this process, on vLLM in this process, or behind servers.

Knows the public options; each engine's folder knows how to honour them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from midlogit.engines.base import Engine
from midlogit.engines.draft_length import SpeculationOption
from midlogit.engines.http.upstream import Upstream
from midlogit.models.checkpoint import TemplateNames
from midlogit.models.mixing import Mixing

if TYPE_CHECKING:
    from torch.nn import Module


class Openers(ABC):
    """The part of `midlogit.Pair` that opens an engine."""

    @abstractmethod
    def __init__(self, mixing: Mixing, engine: Engine) -> None: ...

    @classmethod
    def local(
        cls,
        base: str | Path | Module | None = None,
        teacher: str | Path | Module | None = None,
        *,
        base_tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        device: str | tuple[str, str] = "auto",
        dtype: str = "auto",
        max_num_seqs: int = 16,
        speculation: SpeculationOption = "auto",
        chat_template: TemplateNames = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Two transformers models in this process; without names the bundled pair.

        Args:
            base, teacher: Hugging Face model folders or hub ids; may be the same. Or modules that are loaded already,
                such as the model that a trainer trains, or a PeftModel: it is shared, not copied, stays on its device
                and in its dtype, and is in evaluation mode for each forward only.
            base_tokenizer, teacher_tokenizer: of modules; by default those of the folders they were loaded from.
            device: "auto", "cpu", "cuda", "cuda:1", or one for each of (base, teacher); of what is loaded here, by
                default beside the other side's module.
            dtype: "auto" (float32 on the CPU, else bfloat16), "float32", "float64", "bfloat16", "float16"; of what is
                loaded here.
            max_num_seqs: most sequences that run at once; more wait.
            speculation: tokens that the base drafts ahead for the teacher to check at once; "auto" chooses as
                many as measured times say pay. It changes the speed, never the tokens (docs/speculation.md).
            chat_template: which of a tokenizer's named chat templates to use: a name, or one for each of
                (base, teacher); by default the only one, or the one named "default".
            trust_remote_code: whether to run Python code that comes with a model; a model that needs it is refused
                otherwise.

        Raises:
            ModelUnavailable: a model that is not there or not a causal LM.
            PairMismatch: tokenizers that disagree.
            InvalidRequest: an unknown device, dtype or chat template, a speculation out of range, only one of the
                models named, or a tokenizer that is missing or of no use.
            MissingExtra: torch or transformers is not installed.
        """
        from midlogit.engines.local.opening import open_pair

        mixing, engine = open_pair(
            base,
            teacher,
            base_tokenizer=base_tokenizer,
            teacher_tokenizer=teacher_tokenizer,
            device=device,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            speculation=speculation,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
        )
        return cls(mixing, engine)

    @classmethod
    def http(
        cls,
        base: str | Sequence[str] | Upstream,
        teacher: str | Sequence[str] | Upstream,
        *,
        top_k: int | Literal["auto"] = 20,
        tolerance: float = 0.05,
        speculation: SpeculationOption = "auto",
        max_num_seqs: int = 256,
        connection_pool_size: int = 100,
        max_retries: int = 3,
        timeout: float = 120.0,
    ) -> Self:
        """Two vLLM servers; everything that makes them unusable is raised here, before anything is generated.

        Args:
            base, teacher: the server's OpenAI URL, ending in /v1; several for replicas of one model. An `Upstream`
                also names the model, its tokenizer files, the API key or a chat template.
            top_k: log-probabilities to ask of each side, or "auto" to ask for more where the certified bound
                on the total variation exceeds `tolerance`.
            speculation: tokens that the base's server drafts for the teacher's to verify in one call; "auto"
                chooses as many as measured times say pay, and drafts none for requests that give a seed: over
                HTTP the tokens at a seed depend on the number, their distribution does not (docs/speculation.md).
            max_num_seqs: most sequences that run at once; more wait.
            connection_pool_size: most connections at once. max_retries: of a call that failed.
            timeout: seconds for one call; no request outlives (max_retries + 1) of them and the waits between.

        Raises:
            ServerUnavailable: a server that cannot be reached, refuses the key, or lacks what is needed.
            PairMismatch: tokenizers that disagree.
            InvalidRequest: a URL, model name, top_k, speculation or number that cannot be honoured.
            MissingExtra: aiohttp is not installed.
        """
        from midlogit.engines.http.opening import open_pair

        mixing, engine = open_pair(
            base if isinstance(base, Upstream) else Upstream(base),
            teacher if isinstance(teacher, Upstream) else Upstream(teacher),
            top_k=top_k,
            tolerance=tolerance,
            speculation=speculation,
            max_num_seqs=max_num_seqs,
            connection_pool_size=connection_pool_size,
            max_retries=max_retries,
            timeout=timeout,
        )
        return cls(mixing, engine)

    @classmethod
    def vllm(
        cls,
        base: str | Path | None = None,
        teacher: str | Path | None = None,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: tuple[int, int] | None = None,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        speculation: SpeculationOption = "auto",
        chat_template: TemplateNames = None,
        trust_remote_code: bool = False,
        base_lora: str | Path | None = None,
        teacher_lora: str | Path | None = None,
        tensor_parallel_size: int = 1,
        base_args: Mapping[str, Any] | None = None,
        teacher_args: Mapping[str, Any] | None = None,
        **engine_args: Any,
    ) -> Self:
        """Two models inside this process on vLLM's scheduler, paged attention and CUDA graphs, full vocabulary.

        Args:
            base, teacher: Hugging Face model folders or hub ids; without names the bundled pair.
            dtype: as vLLM names it: "auto" (the model's own), "bfloat16", "float16", "float32".
            gpu_memory_utilization: share of the device that both models and their caches may take together.
            kv_cache_memory_bytes: sizes of the KV caches of (base, teacher); by default what is left, split so
                that both hold the same number of tokens.
            max_num_seqs: most sequences that run at once; more wait.
            max_model_len: most tokens of prompt and completion; by default what both models allow.
            speculation: tokens that the base drafts ahead for the teacher to check at once; "auto" chooses as
                many as measured times say pay. It changes the speed, never the tokens (docs/speculation.md).
            chat_template, trust_remote_code: as of `Pair.local`.
            base_lora, teacher_lora: folder of a LoRA adapter, as PEFT saves it, for all requests (docs/vllm.md).
            tensor_parallel_size: how many devices share each model; the other ranks are processes that the pair
                starts and ends (docs/vllm.md).
            base_args, teacher_args: options of vLLM's EngineArgs for one side, in the place of those for both.
            engine_args: further options of vLLM's EngineArgs, for both models (docs/vllm.md).

        Raises:
            ModelUnavailable: a model that is not there, or that vLLM cannot run.
            DoesNotFit: models and caches larger than the device; says how much each needs and what is free.
            PairMismatch: tokenizers that disagree.
            InvalidRequest: a value out of range, or a vLLM option that two engines in lock-step cannot honour.
            MissingExtra: vLLM is not installed; UnsupportedVersion: one whose internals are not known.
        """
        from midlogit.engines.vllm.opening import open_pair

        mixing, engine = open_pair(
            base,
            teacher,
            dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            speculation=speculation,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            options=engine_args,
            loras=(base_lora, teacher_lora),
            base_args=base_args or {},
            teacher_args=teacher_args or {},
        )
        return cls(mixing, engine)
