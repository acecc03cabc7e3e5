"""`midlogit doctor`: whether two models can be mixed, from tokenizers and configurations alone.

Knows what to check and how to say it; loads no weights.
"""

from __future__ import annotations

from midlogit.checkpoint import Checkpoint
from midlogit.cli.loading import quiet_transformers
from midlogit.errors import MidlogitError
from midlogit.mixing import Mixing
from midlogit.pair import open_mixing

BYTES = {"float64": 8, "float32": 4, "auto": 4, "bfloat16": 2, "float16": 2}
SHOWN_IDS = 8
SHOWN_SEQUENCES, SHOWN_CONTEXT = 16, 2048


def run_doctor(base: str | None, teacher: str | None, dtype: str) -> int:
    """Prints the report; 0 when the pair can be mixed, 1 when not."""
    quiet_transformers()
    mixing = open_mixing(base, teacher)
    for side, checkpoint in (("base", mixing.base), ("teacher", mixing.teacher)):
        _describe(side, checkpoint, BYTES.get(dtype, 4))
    _describe_mixture(mixing)
    _describe_memory(mixing, BYTES.get(dtype, 4))
    try:
        mixing.require_mixable()
    except MidlogitError as error:
        print(f"verdict    cannot be mixed: {error}")
        return 1
    unsupported = {c.name: c.unsupported_layers for c in (mixing.base, mixing.teacher) if c.unsupported_layers}
    for name, kinds in unsupported.items():
        print(f"verdict    {name} has layers that the local engine cannot batch: {', '.join(sorted(kinds))}")
    if unsupported:
        return 1
    print("verdict    can be mixed")
    return 0


def _describe(side: str, checkpoint: Checkpoint, width: int) -> None:
    stop = ", ".join(f"{i} {checkpoint.vocabulary.get(i, '?')}" for i in checkpoint.stop_ids) or "none"
    template = "chat template" if checkpoint.has_chat_template else "no chat template: plain Question:/Answer: form"
    print(f"{side:<11}{checkpoint.name}")
    print(f"           {checkpoint.config.model_type}, context {checkpoint.max_context}, {template}")
    print(f"           {len(checkpoint.vocabulary)} tokens, {checkpoint.logit_size} logits, stop ids: {stop}")
    count = checkpoint.weight_count
    weights = f"{count / 1e6:.1f} M weights, {_size(count * width)}" if count else "weights not on this machine"
    print(f"           {weights}; KV cache {_size(checkpoint.kv_values_per_token * width)} a token")


def _describe_mixture(mixing: Mixing) -> None:
    alignment = mixing.alignment
    differing = f"{len(alignment.differing)} of {alignment.shared} shared ids differ"
    if alignment.differing:
        differing += f" ({alignment.describe_differences()}); they are masked"
    print(f"ids        {alignment.size} used; {differing}; {len(alignment.undefined)} undefined, masked")
    merged = " counted as one outcome" if len(mixing.stop_ids) > 1 else ""
    print(f"stop       {_ids(mixing.stop_ids)}{merged}")
    print(f"special    {_ids(sorted(mixing.special_ids))} masked by default")
    print(f"context    {min(mixing.base.max_context, mixing.teacher.max_context)} tokens, the smaller of the two")


def _describe_memory(mixing: Mixing, width: int) -> None:
    """Weights of both (once, if they are one folder) and the caches of a full default batch."""
    distinct = {checkpoint.name: checkpoint for checkpoint in (mixing.base, mixing.teacher)}.values()
    counts = [checkpoint.weight_count for checkpoint in distinct]
    context = min(mixing.base.max_context, mixing.teacher.max_context, SHOWN_CONTEXT)
    a_token = mixing.base.kv_values_per_token + mixing.teacher.kv_values_per_token
    caches = _size(a_token * width * context * SHOWN_SEQUENCES)
    weights = _size(sum(c or 0 for c in counts) * width) if all(counts) else "unknown"
    print(f"memory     weights {weights}; KV caches {caches} for {SHOWN_SEQUENCES} sequences of {context} tokens")


def _ids(ids: tuple[int, ...] | list[int]) -> str:
    shown = ", ".join(map(str, ids[:SHOWN_IDS])) or "none"
    return shown + (f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else "")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
