"""The generation backend of TRL's trainers that samples from q*; knows a pair and the trainer's attributes.

Knows not whether the trainer makes right use of its samples: `checks` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from midlogit.core.uniforms import identity
from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.integrations.rollout_metrics import RolloutSums, noise_metrics, rollout_metrics
from midlogit.integrations.trl.weights import named_weights
from midlogit.pair import Pair
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt
from midlogit.rollout import Rollout


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

    def bind(self, trainer: Any) -> None:
        """Takes temperature, lengths, weights and steps from this trainer, and logs to it."""
        self._trainer = trainer

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
        """Rollouts of the prompts; logs the metrics of those of all processes."""
        from accelerate.utils import gather_object

        params = self.params
        if params.seed is not None:
            params = replace(params, seed=self._step_seed(params.seed))

        completions = self.pair.generate(prompts, params, progress=False, **sides)
        for completion in completions:
            if completion.error is not None:
                raise EngineFailure(f"A rollout failed: {completion.error}")

        self.rollouts = [completion.rollout() for completion in completions]
        mine = [RolloutSums.of(rollout) for rollout in self.rollouts]
        self._log(rollout_metrics(gather_object(mine)))
        return self.rollouts

    def _step_seed(self, seed: int) -> int:
        """A seed for this call: of the step, so that a resumed run goes on with new draws, and of the process."""
        trainer = self._trainer
        self._calls += 1
        place = (trainer.state.global_step, self._calls, trainer.accelerator.process_index)
        return int.from_bytes(identity([seed % 2**63], place)[:8], "little")

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
