"""verl's agent loop "midlogit": one prompt in, one rollout from q* out; knows verl's messages and rows, no server.

verl makes a loop for each rollout, in the processes of its agent loop workers.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.utils.profiler import simple_timer

from midlogit.integrations.checks import require
from midlogit.integrations.verl.checks import is_training, require_trainable
from midlogit.integrations.verl.options import Options
from midlogit.integrations.verl.pairs import pair_of
from midlogit.outputs import Completion
from midlogit.rollout import Rollout


@register("midlogit")
class MidlogitAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """A single turn that is drawn from q* of the policy and the teacher.

    The policy reads the prompt as verl makes it, the teacher the same messages in its own chat template. Validation,
    and whatever else verl samples otherwise than its training rollouts, is drawn from the policy alone.

    Raises:
        InvalidRequest: when it is made, for a configuration with which training would be silently wrong.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = Options.of(self.rollout_config)
        self.params = self.options.params(self.rollout_config)
        require_trainable(self.config, self.params)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """One rollout of the data set's row.

        Args:
            sampling_params: as verl gives them. kwargs: the row's columns, `raw_prompt` among them.

        Raises:
            EngineFailure, InvalidRequest: it failed; verl has no row for it.
        """
        if not is_training(self.rollout_config, sampling_params):
            return await super().run(sampling_params, **kwargs)

        messages = list(kwargs["raw_prompt"])
        require(
            not await self.process_multi_modal_info(messages),
            "A prompt has images, videos or sounds.",
            "midlogit mixes models of text alone.",
        )
        prompt_ids = await self.ct_build_initial_tokens(messages)

        metrics: dict[str, Any] = {}
        with simple_timer("generate_sequences", metrics):
            first = await self._weight_steps(prompt_ids)
            completion = await self._draw(prompt_ids, messages)
            last = await self._weight_steps(prompt_ids)
        steps = {
            "global_steps": last["max_global_steps"],
            "min_global_steps": first["min_global_steps"],
            "max_global_steps": last["max_global_steps"],
        }
        return self._row(completion, metrics, steps)

    async def _draw(self, prompt_ids: list[int], messages: list[Any]) -> Completion:
        pair = await pair_of(self.server_manager, self.options, self.tokenizer)
        variables = OmegaConf.to_container(OmegaConf.create(self.apply_chat_template_kwargs))
        completions = await pair.agenerate(
            base_prompts=[prompt_ids],
            teacher_prompts=[messages],
            params=self.params,
            chat_template_kwargs=(None, variables),
        )
        return completions[0]

    async def _weight_steps(self, prompt_ids: list[int]) -> dict[str, Any]:
        """Between which trainer steps the weights are that verl's servers have now.

        verl says so with what it generates, and holds requests back while new weights arrive.
        """
        output = await self.server_manager.generate(
            uuid4().hex,
            prompt_ids=prompt_ids,
            sampling_params={"max_tokens": 1, "temperature": self.params.temperature},
        )
        return dict(output.extra_fields)

    def _row(
        self, completion: Completion, metrics: dict[str, Any], steps: dict[str, Any]
    ) -> AgentLoopOutput:
        rollout = completion.rollout()
        tv_bound = max(completion.diagnostics.tv_bound)
        teacher_ids, teacher_logprobs = teacher_rows(rollout)
        return AgentLoopOutput(
            prompt_ids=rollout.prompt_token_ids,
            response_ids=rollout.token_ids,
            response_mask=[int(tv_bound <= self.options.max_tv_bound)] * len(rollout.token_ids),
            response_logprobs=rollout.logprobs,
            num_turns=2,
            metrics=metrics,
            extra_fields={
                **steps,
                "turn_scores": [],
                "tool_rewards": [],
                "teacher_ids": teacher_ids,
                "teacher_logprobs": teacher_logprobs,
                "alpha": sum(rollout.alpha) / len(rollout.alpha),
                "kl_base": sum(rollout.kl_base),
                "tv_bound": tv_bound,
            },
        )


def teacher_rows(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's log-probabilities of prompt and response in verl's form: row i is of token i + 1, the last of none.

    The teacher read another prompt than the policy, so those of the prompt's tokens are 0; no loss reads them.

    Returns:
        (ids, log-probabilities): int32 and float32, each of shape [tokens of prompt and response, 1].
    """
    of_prompt = len(rollout.prompt_token_ids) - 1
    ids = [*rollout.prompt_token_ids[1:], *rollout.token_ids, 0]
    logprobs = [0.0] * of_prompt + [*rollout.teacher_logprobs, 0.0]
    return torch.tensor(ids, dtype=torch.int32)[:, None], torch.tensor(logprobs)[:, None]
