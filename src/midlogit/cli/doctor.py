"""`midlogit doctor`: says whether two models can be mixed, from tokenizers and configurations or servers' handshakes.

Knows what to check and how to say it; loads no weights, generates nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from midlogit.cli.loading import PairOptions, quiet_transformers
from midlogit.engines.vllm.options import why_unusable
from midlogit.errors import InvalidRequest, MidlogitError
from midlogit.models.checkpoint import Checkpoint, Model, files_of, open_checkpoints
from midlogit.models.fit import require_fit
from midlogit.models.mixing import Mixing
from midlogit.models.weights import kv_values_per_token, weight_count

if TYPE_CHECKING:
    from midlogit.engines.http.opening import OpenedSide

BYTES = {"float64": 8, "float32": 4, "auto": 4, "bfloat16": 2, "float16": 2}
SHOWN_IDS = 8
SHOWN_SEQUENCES, SHOWN_CONTEXT = 16, 2048


def run_doctor(options: PairOptions, dtype: str) -> int:
    """Prints the report; returns 0 when the pair can be mixed, 1 when not.

    Raises:
        MidlogitError: a model or server that cannot be opened at all.
    """
    if dtype not in BYTES:
        raise InvalidRequest(f"Unknown dtype {dtype!r}.", f"Use {', '.join(BYTES)}.")
    return _servers(options) if options.on_servers else _folders(options, BYTES[dtype])


def _folders(options: PairOptions, width: int) -> int:
    """Reports on two folders or hub ids, with weights of `width` bytes each."""
    quiet_transformers()
    checkpoints = open_checkpoints(
        options.base,
        options.teacher,
        options.chat_templates,
        trust_remote_code=options.trust_remote_code,
    )
    for checkpoint in checkpoints:
        if weight_count(checkpoint):
            require_fit(checkpoint)
    mixing = Mixing(*checkpoints)
    for side, checkpoint in zip(("base", "teacher"), checkpoints, strict=True):
        _describe(side, checkpoint, width)
    _describe_mixture(mixing)
    _describe_memory(checkpoints, width)

    try:
        mixing.require_mixable()
    except MidlogitError as error:
        print(f"verdict    cannot be mixed: {error}")
        return 1

    unsupported = {c.name: c.unsupported_layers for c in checkpoints if c.unsupported_layers}
    for name, kinds in unsupported.items():
        print(
            f"verdict    {name} has layers that the local engine cannot batch: {', '.join(sorted(kinds))}"
        )
    if unsupported:
        return 1

    _can_be_mixed(mixing)
    reason = why_unusable()
    print(f"engine     auto takes {f'local: {reason}' if reason else 'vllm'}")
    return 0


def _servers(options: PairOptions) -> int:
    """Reports on two servers, by a handshake with both."""
    from midlogit.engines.http.opening import handshake

    with handshake(*options.upstreams, options.parsed_top_k()) as sides:
        mixing = Mixing(sides[0].model, sides[1].model)
        for side in sides:
            _describe_served(side)
        _describe_mixture(mixing)

        try:
            mixing.require_mixable()
        except MidlogitError as error:
            print(f"verdict    cannot be mixed: {error}")
            return 1

        _can_be_mixed(mixing)
    return 0


def _can_be_mixed(mixing: Mixing) -> None:
    print("verdict    can be mixed")
    for side, model in (("base", mixing.base), ("teacher", mixing.teacher)):
        if (files := files_of(model)) is not None and not files.has_default_template:
            names = " or ".join(files.template_names)
            print(
                f"           chat needs a choice of the {side}'s template: --{side}-chat-template {names}"
            )


def _describe_served(side: OpenedSide) -> None:
    model = side.model
    for facts in side.facts:
        print(f"{facts.endpoint.side:<11}{facts.endpoint.name.partition(' ')[2]}")
        print(f"           vLLM {facts.version or 'of unknown version'} serving {facts.model}")
        scored = (
            "chosen ids can be scored"
            if facts.scores
            else "chosen ids cannot be scored: bounds are wider"
        )
        print(
            f"           up to {facts.max_logprobs} log-probabilities per token by token id; {scored}"
        )
        if facts.endpoint.side == "teacher":
            verified = "as one sequence" if facts.verifies else "by a prompt for each"
            print(f"           drafts are verified {verified}")
    template = _template(model)
    print(f"           context {model.max_context}, {model.logit_size} logits, {template}")
    source = "asked of the server" if model.vocabulary is None else f"files in {model.name}"
    print(f"           tokenizer {source}; stop ids: {_ids(model.stop_ids)}")


def _describe(side: str, checkpoint: Checkpoint, width: int) -> None:
    stop = (
        ", ".join(f"{i} {checkpoint.vocabulary.get(i, '?')}" for i in checkpoint.stop_ids) or "none"
    )
    template = _template(checkpoint)
    print(f"{side:<11}{checkpoint.name}")
    print(
        f"           {checkpoint.config.model_type}, context {checkpoint.max_context}, {template}"
    )
    print(
        f"           {len(checkpoint.vocabulary)} tokens, {checkpoint.logit_size} logits, stop ids: {stop}"
    )
    count = weight_count(checkpoint)
    weights = (
        f"{count / 1e6:.1f} M weights, {_size(count * width)}"
        if count
        else "weights not on this machine"
    )
    print(
        f"           {weights}; KV cache {_size(kv_values_per_token(checkpoint) * width)} per token"
    )


def _template(model: Model) -> str:
    if not model.has_chat_template:
        return "no chat template: plain Question:/Answer: form"
    files = files_of(model)
    if files is None or not files.template_names:
        return "chat template"
    chosen = files.template_name or ("default" if files.has_default_template else "none chosen")
    return f"chat templates {', '.join(files.template_names)} ({chosen})"


def _describe_mixture(mixing: Mixing) -> None:
    alignment = mixing.alignment
    differing = f"{len(alignment.differing)} of {alignment.shared} shared ids differ"
    if alignment.differing:
        differing += f" ({alignment.describe_differences()}); they are masked"
    if mixing.base.vocabulary is None or mixing.teacher.vocabulary is None:
        print(f"ids        {alignment.size} used; the tokenizers agree on the probe texts")
    else:
        print(
            f"ids        {alignment.size} used; {differing}; {len(alignment.undefined)} undefined, masked"
        )
    merged = " counted as one outcome" if len(mixing.stop_ids) > 1 else ""
    alone = "".join(
        f"; {i} is of the {side} alone" for i, side in mixing.stops_of_one_model.items()
    )
    print(f"stop       {_ids(mixing.stop_ids)}{merged}{alone}")
    print(f"special    {_ids(sorted(mixing.special_ids))} masked by default")
    print(
        f"context    {min(mixing.base.max_context, mixing.teacher.max_context)} tokens, the smaller of the two"
    )


def _describe_memory(checkpoints: tuple[Checkpoint, Checkpoint], width: int) -> None:
    """Weights of both, counted once if they are one folder, and the KV caches of a full default batch."""
    counts = [weight_count(checkpoint) for checkpoint in {c.name: c for c in checkpoints}.values()]
    context = min(*(c.max_context for c in checkpoints), SHOWN_CONTEXT)
    per_token = sum(kv_values_per_token(c) for c in checkpoints)
    caches = _size(per_token * width * context * SHOWN_SEQUENCES)
    weights = _size(sum(c or 0 for c in counts) * width) if all(counts) else "unknown"
    print(
        f"memory     weights {weights}; KV caches {caches} for {SHOWN_SEQUENCES} sequences of {context} tokens"
    )


def _ids(ids: tuple[int, ...] | list[int]) -> str:
    shown = ", ".join(map(str, ids[:SHOWN_IDS])) or "none"
    return shown + (f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else "")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
