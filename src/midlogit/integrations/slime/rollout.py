"""slime's custom generate function: samples from q* by servers that stand in for slime's own; knows no trainer step.

The servers are `midlogit serve --train`. slime sends them the policy's weights itself, as to SGLang's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from midlogit.integrations.slime.calls import post
from midlogit.integrations.slime.checks import (
    require_correction,
    require_replay,
    require_servers,
)

ALPHA_RULE = "midlogit_alpha_rule"  # an argument of the user's
RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
# How SGLang shows and trims text; the server answers with ids, which are decoded here.
OF_TEXT = ("skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens", "custom_params")
STATUS = {"stop": "completed", "length": "truncated", "abort": "aborted"}
TEACHER_IDS = "teacher_prompt_token_ids"


async def generate(
    args: Any, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False
) -> Any:
    """Draws the response of a sample from q*; in an evaluation from the policy alone.

    A prompt of messages is rendered for each model in its own chat template; both models read the ids of one of text.
    `metadata["teacher_prompt"]` is the teacher's instead, if it is there: text, messages or token ids. A sample that an
    update of the weights has cut off goes on where it was.

    Args:
        args: slime's. `midlogit_alpha_rule`, from --custom-config-path, is the rule for α in place of the preset's.
        sample: slime's Sample. Its tokens, response, response_length, rollout_log_probs (log q of each token),
            teacher_log_probs (at the same temperature), loss_mask, weight_versions and status are filled; with a
            nucleus (--rollout-top-p, of the teacher) also its ids.

    Raises:
        InvalidRequest: slime's settings would make the training wrong, or the server cannot honour them.
        EngineFailure: the server failed.
    """
    addresses = require_servers(args)
    if not evaluation:
        require_correction(args)

    left = sampling_params["max_new_tokens"] - sample.response_length
    if left <= 0:
        sample.status = type(sample.status)("truncated")
        return sample

    tokenizer = _tokenizer(args.hf_checkpoint)
    if not sample.tokens:
        sample.tokens = _prompt_ids(sample, tokenizer)
    params = {
        RENAMED.get(name, name): value
        for name, value in sampling_params.items()
        if name not in OF_TEXT
    } | {"max_tokens": left, "logprobs": 0}
    if not evaluation:
        params |= _mixture(args, sample, params)

    group = sample.index if sample.group_index is None else sample.group_index
    address = addresses[(group or 0) % len(addresses)]  # prompts of a group share a prefix cache
    path = "/base/inference/v1/generate" if evaluation else "/inference/v1/generate"
    answer = await post(address, path, {"token_ids": sample.tokens, "sampling_params": params})
    (choice,) = answer["choices"]
    if not evaluation:
        require_replay(choice.get("sampling_mask"), sampling_params["top_p"])

    _append(sample, choice)
    sample.response += tokenizer.decode(
        choice["token_ids"], skip_special_tokens=bool(sampling_params.get("skip_special_tokens"))
    )
    return sample


@lru_cache(maxsize=1)
def _tokenizer(checkpoint: str) -> Any:
    """The policy's tokenizer; the server has it without code of the model's own, too."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def _prompt_ids(sample: Any, tokenizer: Any) -> list[int]:
    """What the policy reads."""
    prompt = sample.prompt
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True, **sample.apply_chat_template_kwargs
        )
    return list(tokenizer.encode(prompt, add_special_tokens=False))


def _mixture(args: Any, sample: Any, params: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters of q*, a nucleus in place of the policy's own."""
    options: dict[str, Any] = {"preset": "rollout", "diagnostics": True}
    if (rule := getattr(args, ALPHA_RULE, None)) is not None:
        options["alpha_rule"] = rule
    if params["top_p"] != 1.0:
        options["target_top_p"] = params["top_p"]

    own = sample.metadata.get("teacher_prompt")
    if sample.response_length and TEACHER_IDS in sample.metadata:
        own = sample.metadata[TEACHER_IDS] + sample.tokens[-sample.response_length :]
    elif own is None and not isinstance(sample.prompt, str):
        own = sample.prompt
    if own is not None:
        options["teacher_prompt"] = own
    return {"top_p": 1.0, "return_token_ids": True, "midlogit": options}


def _append(sample: Any, choice: dict[str, Any]) -> None:
    """Adds what was drawn to a sample."""
    ids = choice["token_ids"]
    before = sample.response_length
    sample.loss_mask = [*(sample.loss_mask or [1] * before), *[1] * len(ids)]
    sample.tokens = [*sample.tokens, *ids]
    sample.response_length = before + len(ids)
    drawn = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    sample.rollout_log_probs = [*(sample.rollout_log_probs or ()), *drawn]
    sample.status = type(sample.status)(STATUS[choice["finish_reason"]])
    for span in choice.get("weight_versions", ()):
        version = str(span["version"])
        if version not in sample.weight_versions:
            sample.weight_versions.append(version)

    facts = choice.get("midlogit")
    if facts is not None:
        teacher = facts["diagnostics"]["teacher_tempered_logprobs"]
        sample.teacher_log_probs = [*(sample.teacher_log_probs or ()), *teacher]
        sample.metadata.setdefault(TEACHER_IDS, facts[TEACHER_IDS])
    if choice.get("sampling_mask") is not None:
        _append_nucleus(sample, choice["sampling_mask"])


def _append_nucleus(sample: Any, mask: list[list[int]]) -> None:
    """Adds the ids of each nucleus, one after another, and where each ends."""
    ids = list(sample.rollout_top_p_token_ids or ())
    offsets = list(sample.rollout_top_p_token_offsets or (0,))
    for kept in mask:
        ids += kept
        offsets.append(len(ids))
    sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets = ids, offsets
