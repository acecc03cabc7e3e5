"""verl's manager of agent loop workers that checks the run before the first of them starts; draws nothing."""

from __future__ import annotations

import asyncio

from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.utils.config import omega_conf_to_dataclass

from midlogit.integrations.verl.checks import require_trainable
from midlogit.integrations.verl.options import Options
from midlogit.integrations.verl.pairs import open_pair, policy_urls


class MidlogitAgentLoopManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """Ends a run at its start that the agent loop "midlogit" would refuse.

    verl's trainer takes a rollout that fails for a missing sample and trains on; what is raised here ends it. Named as
    `actor_rollout_ref.rollout.agent.agent_loop_manager_class`.
    """

    async def _init_agent_loop_workers(self) -> None:
        options = Options.of(self.rollout_config)
        require_trainable(self.config, options.params(self.rollout_config))
        urls = await policy_urls(self.llm_client)
        if urls:  # some trainers add servers later
            tokenizer = omega_conf_to_dataclass(self.model_config).tokenizer
            pair = await asyncio.to_thread(open_pair, urls, options, tokenizer)
            pair.close()
        await super()._init_agent_loop_workers()
