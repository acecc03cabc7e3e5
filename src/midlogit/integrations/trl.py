"""Rollouts from q* inside TRL's trainers: the generation backend, and what must hold for its samples to be right.

Knows the attributes of TRL 1.16's trainers; imports neither TRL nor torch by itself. The traps that `attach` refuses
are listed in docs/training.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from midlogit.core.rules import FixedAlpha, KLBudget
from midlogit.core.uniforms import identity
from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.integrations.rollout_metrics import noise_metrics, rollout_metrics
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.mixing import Mixing
from midlogit.pair import Pair
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt
from midlogit.rollout import Rollout

SEQUENCE_NATS = (
    1.0  # most KL(q‖base) of a completion for which weights of whole sequences are of use
)
USE_LOGPROBS = ("GRPOTrainer", "IWOPDTrainer")  # their losses weigh a sample by its probability
USE_STATES = ("DistillationTrainer", "GOLDTrainer")  # their losses look at whole rows where q* went
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


class MidlogitGeneration:
    """A generation backend of TRL's trainers that samples from q*: `attach` puts it in place of vLLM.

    Args:
        pair: its base is the trainer's own module (`Pair.local(trainer.model, ...)`), or a copy of it that
            `sync_weights` updates.
        params: of the rollouts, by default `SamplingParams.preset("rollout")`; temperature and max_tokens become the
            trainer's. A seed is mixed with the step, so that each step draws anew.
        teacher_prompt: the teacher's prompt for the ids of the trainer's prompt. Without it each model of a GRPO run
            reads the data set's prompt in its own form (`rollout_func`); in other trainers, whose losses feed the
            teacher what the student read, both read the same ids.

    Attributes:
        rollouts: of the last call, in the order of its prompts.
    """

    def __init__(
        self,
        pair: Pair,
        params: SamplingParams | None = None,
        *,
        teacher_prompt: Callable[[list[int]], Prompt] | None = None,
    ) -> None:
        self.pair = pair
        self.rollouts: list[Rollout] = []
        self._params = params
        self._teacher_prompt = teacher_prompt
        self._trainer: Any = None
        self._calls = 0

    @property
    def params(self) -> SamplingParams:
        """The parameters of the rollouts, with the trainer's temperature and length once attached."""
        if self._trainer is None:
            return self._params or SamplingParams.preset("rollout")
        args = self._trainer.args
        shared = {"temperature": args.temperature, "max_tokens": args.max_completion_length}
        if self._params is None:
            return SamplingParams.preset("rollout", **shared)
        return replace(self._params, **shared)

    @property
    def reads_ids(self) -> bool:
        """Whether the teacher's prompt is made of the ids that the student reads."""
        return self._teacher_prompt is not None

    def sync_weights(self) -> None:
        """Tells the pair that the base's weights have changed, and copies them where the pair has its own."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        step = trainer.state.global_step
        if self.pair.shares_base(model):
            self.pair.update_base(version=step)
        else:
            with named_weights(model) as weights:
                self.pair.update_base(weights, version=step)

    def generate(
        self,
        prompts: Sequence[list[int]],
        images: Any = None,
        num_generations: int = 1,
        profiler: Any = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Draws one completion per prompt; TRL repeats a prompt for each sample of its group.

        Args:
            prompts: ids of the trainer's prompts, the base's.

        Returns:
            (prompt ids, completion ids, log q* of each token, the tokens again), the last two with one entry per
            position, as TRL takes the sampled token's log-probability first.

        Raises:
            EngineFailure: a completion failed; TRL has no row for it.
            InvalidRequest: a prompt that cannot be honoured, or one with images.
        """
        if images is not None and any(images):
            raise InvalidRequest("A prompt has images.", "midlogit mixes models of text alone.")
        base_prompts = [list(ids) for ids in prompts]
        make = self._teacher_prompt
        teacher_prompts = base_prompts if make is None else [make(ids) for ids in base_prompts]
        rollouts = self._roll_out(base_prompts=base_prompts, teacher_prompts=teacher_prompts)
        return (
            base_prompts,
            [rollout.token_ids for rollout in rollouts],
            [[[logprob] for logprob in rollout.logprobs] for rollout in rollouts],
            [[[token_id] for token_id in rollout.token_ids] for rollout in rollouts],
        )

    def rollout_func(self, prompts: Sequence[Prompt], trainer: Any) -> dict[str, list[Any]]:
        """Draws one completion per prompt of the data set, text or messages, which each model reads in its own form.

        GRPO's `rollout_func` once attached. Passed to the trainer alone, TRL ignores its log-probabilities.

        Returns:
            `prompt_ids`, `completion_ids`, `logprobs`; and `alpha` and `kl`, the means over each completion, which
            reach the reward functions.
        """
        rollouts = self._roll_out(prompts, chat_template_kwargs=trainer.chat_template_kwargs)
        return {
            "prompt_ids": [rollout.prompt_token_ids for rollout in rollouts],
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.logprobs for rollout in rollouts],
            "alpha": [sum(rollout.alpha) / len(rollout.alpha) for rollout in rollouts],
            "kl": [sum(rollout.kl_base) / len(rollout.kl_base) for rollout in rollouts],
        }

    def _roll_out(self, prompts: Sequence[Prompt] | None = None, **sides: Any) -> list[Rollout]:
        """Rollouts of the prompts; logs their metrics."""
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=self._step_seed(params.seed))

        completions = self.pair.generate(prompts, params, progress=False, **sides)
        for completion in completions:
            if completion.error is not None:
                raise EngineFailure(f"A rollout failed: {completion.error}")

        self.rollouts = [completion.rollout() for completion in completions]
        self._log(rollout_metrics(self._gathered(self.rollouts)))
        return self.rollouts

    def _step_seed(self, seed: int) -> int:
        """A seed for this call: of the step, so that a resumed run goes on with new draws, and of the process."""
        trainer = self._trainer
        self._calls += 1
        place = (trainer.state.global_step, self._calls, trainer.accelerator.process_index)
        return int.from_bytes(identity([seed % 2**63], place)[:8], "little")

    def _gathered(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts of all processes."""
        from accelerate.utils import gather_object

        return list(gather_object(rollouts))

    def _log(self, metrics: dict[str, float]) -> None:
        trainer = self._trainer
        log = trainer._metrics["train" if trainer.model.training else "eval"]
        for name, value in metrics.items():
            log[f"midlogit/{name}"].append(value)

    def log_noise(self, outputs: dict[str, Any]) -> None:
        """Logs how far the trainer's log-probabilities are from the base's that drew the last rollouts.

        Args:
            outputs: what GRPO's `_generate_and_score_completions` returns.
        """
        trained = outputs.get("old_per_token_logps")
        lengths = [len(rollout.token_ids) for rollout in self.rollouts]
        if trained is None or outputs["completion_mask"].sum(1).tolist() != lengths:
            return  # after tool calls, a completion is more than its last rollout
        self._log(noise_metrics(self.rollouts, trained.tolist()))


def attach(trainer: Any, generation: MidlogitGeneration) -> None:
    """Has a trainer draw its rollouts from q*.

    GRPO, Distillation, GOLD and IW-OPD are known. The trainer is built with `use_vllm=False`; afterwards it treats
    `generation` as its vLLM, and corrects for q* as the behaviour policy.

    Raises:
        InvalidRequest: something would make training silently wrong; says what to change (docs/training.md).
    """
    kind = _kind_of(trainer)
    generation._trainer = trainer
    params, args = generation.params, trainer.args

    _require_own_generation(trainer)
    for name, neutral in NEUTRAL.items():
        value = getattr(args, name, neutral)
        _require(
            value in (neutral, None),
            f"{name} is {value}, which q* does not honour.",
            f"Set {name}={neutral}.",
        )
    _require(
        params.temperature > 0, "temperature is 0.", "Rollouts are samples: give a temperature."
    )
    _require_student_stops(trainer, generation.pair.mixing, params)
    if kind in USE_LOGPROBS:
        _require_ratios(trainer, params)
    if kind == "GRPOTrainer":
        _require_correction(trainer, params)
        _watch_noise(trainer, generation)
        if not (trainer.rollout_func or trainer.tools or generation.reads_ids):
            trainer.rollout_func = generation.rollout_func

    trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation = True, "server", generation
    trainer._last_loaded_step = -1  # of GRPO and Distillation
    trainer._last_vllm_sync_step, trainer.vllm_sync_frequency = -1, 1  # of GOLD and IW-OPD


def align_stop_ids(teacher: Any, mixing: Mixing) -> tuple[int, int] | None:
    """Has a teacher give its probability of ending to the student's ending id: two rows of its output head swap.

    Losses that compare ids, such as distillation's, otherwise teach a student whose ending id differs never to end.
    The head is untied from the embeddings. The teacher may not be one of a running pair.

    Args:
        teacher: the teacher's module, of the trainer's own. mixing: of the pair (`Pair.mixing`).

    Returns:
        (the student's ending id, the teacher's), or None where they are the same and nothing changes.
    """
    student_id, teacher_id = (_ending_id(side) for side in (mixing.base, mixing.teacher))
    if student_id == teacher_id:
        return None

    head = teacher.get_output_embeddings()
    untied = type(head)(head.in_features, head.out_features, bias=head.bias is not None)
    untied = untied.to(device=head.weight.device, dtype=head.weight.dtype)
    order = list(range(head.out_features))
    order[student_id], order[teacher_id] = teacher_id, student_id
    untied.weight.data = head.weight.data[order]
    if head.bias is not None:
        untied.bias.data = head.bias.data[order]

    teacher.config.tie_word_embeddings = False
    teacher.set_output_embeddings(untied.requires_grad_(head.weight.requires_grad))
    return student_id, teacher_id


@contextmanager
def named_weights(model: Any) -> Iterator[Iterator[tuple[str, Any]]]:
    """The weights of a model by their checkpoint names; adapters of PEFT are merged while they are read."""
    if not hasattr(model, "merge_adapter"):
        yield ((name, weight.data) for name, weight in model.named_parameters())
        return

    model.merge_adapter()
    try:
        yield _merged_weights(model)
    finally:
        model.unmerge_adapter()


def _merged_weights(model: Any) -> Iterator[tuple[str, Any]]:
    for name, weight in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        yield name.replace("modules_to_save.default.", ""), weight.data


def _kind_of(trainer: Any) -> str:
    """Which of the known trainers this is."""
    names = [kind.__name__ for kind in type(trainer).__mro__]
    _require(
        "RLOOTrainer" not in names,
        "RLOOTrainer ignores the log-probabilities of rollouts, so those of q* would count as the policy's own.",
        "Use GRPOTrainer, which corrects for them.",
    )
    known = [name for name in names if name in USE_LOGPROBS + USE_STATES]
    _require(
        bool(known),
        f"{names[0]} is not a trainer whose use of rollouts is known.",
        f"Known are {', '.join(USE_LOGPROBS + USE_STATES)}.",
    )
    return known[0]


def _require_own_generation(trainer: Any) -> None:
    _require(
        not trainer.use_vllm,
        "The trainer has a vLLM of its own.",
        "Build it with use_vllm=False: attach takes vLLM's place.",
    )
    accelerator = trainer.accelerator
    sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None or (
        accelerator.state.deepspeed_plugin is not None
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    _require(
        not sharded,
        "The trainer's weights are sharded over processes (FSDP or ZeRO-3).",
        "Use TRL's server mode with `midlogit serve --train`, to which it sends whole weights.",
    )


def _require_student_stops(trainer: Any, mixing: Mixing, params: SamplingParams) -> None:
    """A completion must end in an id that the trainer takes for an end."""
    foreign = set(mixing.teacher.stop_ids) - set(mixing.base.stop_ids)
    _require(
        params.stop_id == "base" or not foreign,
        f"stop_id is 'teacher': rollouts end with {sorted(foreign)}, which the student hardly emits, and the trainer"
        " counts them as cut off.",
        "Use SamplingParams.preset('rollout'), or stop_id='base'.",
    )
    ends = getattr(trainer, "eos_token_ids", None)
    if ends is not None:
        ends.extend(i for i in mixing.base.stop_ids if i not in ends)


def _require_ratios(trainer: Any, params: SamplingParams) -> None:
    """log q* of a token must be comparable with the trainer's log-probability of it."""
    _require(
        not params.constraint_to_target,
        f"Rollouts are held to the teacher's top-p {params.target_top_p}: what the policy would do outside has no"
        " weight, so the loss is biased, and TRL cannot renormalise on the support.",
        "Use SamplingParams.preset('rollout'), or constraint_to_target=False.",
    )
    _require(
        not params.force_first_token,
        "The first token is forced to the teacher, so its weight is the ratio to the teacher alone.",
        "Use SamplingParams.preset('rollout'), or force_first_token=False.",
    )
    dropouts = [m for m in trainer.model.modules() if type(m).__name__ == "Dropout" and m.p > 0]
    rates = [getattr(trainer.model.config, "attention_dropout", 0.0) or 0.0]
    _require(
        not dropouts and not any(rates),
        "The model has dropout, so the trainer's log-probabilities are of another policy than the one that drew.",
        "Set disable_dropout=True, and lora_dropout=0.0.",
    )


def _require_correction(trainer: Any, params: SamplingParams) -> None:
    """GRPO must weigh its samples, and by weights that do not vanish."""
    _require(
        trainer.vllm_importance_sampling_correction,
        "vllm_importance_sampling_correction is off: rollouts from q* would count as the policy's own.",
        "Set vllm_importance_sampling_correction=True.",
    )
    mode = trainer.vllm_importance_sampling_mode
    nats = _nats(params)
    if mode.startswith("sequence"):
        budget = f"kl-budget:{SEQUENCE_NATS / params.max_tokens:.2g}"
        _require(
            nats <= SEQUENCE_NATS,
            f"vllm_importance_sampling_mode is {mode!r}, and {params.alpha_rule.spec} allows {nats:.3g} nats in"
            f" {params.max_tokens} tokens: weights of whole completions vanish, and nothing is learned.",
            f"Use alpha_rule='{budget}' or less, or token_truncate, which is biased but learns.",
        )
    elif nats > SEQUENCE_NATS:
        warnings.warn(
            f"vllm_importance_sampling_mode is {mode!r}: weights of single tokens leave the law of the prefixes at q*,"
            " so the gradient is biased. A KL budget with a sequence mode is not (docs/training.md).",
            stacklevel=3,
        )


def _nats(params: SamplingParams) -> float:
    """The most KL(q‖base) of a completion that the rule guarantees, in nats."""
    rule = params.alpha_rule
    if isinstance(rule, FixedAlpha) and rule.value == 0:
        return 0.0
    return rule.epsilon * params.max_tokens if isinstance(rule, KLBudget) else float("inf")


def _watch_noise(trainer: Any, generation: MidlogitGeneration) -> None:
    """Has GRPO report each batch after it has computed its own log-probabilities."""
    score = trainer._generate_and_score_completions

    def watched(inputs: Any) -> Any:
        outputs = score(inputs)
        generation.log_noise(outputs)
        return outputs

    trainer._generate_and_score_completions = watched


def _ending_id(side: Any) -> int:
    """The id with which a model ends its answers: its tokenizer's, which chat models set to their end of turn."""
    if isinstance(side, Checkpoint) and side.tokenizer.eos_token_id is not None:
        return int(side.tokenizer.eos_token_id)
    _require(
        bool(side.stop_ids), f"{side.name} has no stop id.", "Set eos_token_id of its tokenizer."
    )
    return int(side.stop_ids[0])


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise InvalidRequest(message, hint)
