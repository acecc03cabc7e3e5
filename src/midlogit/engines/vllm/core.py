"""One vLLM engine core, stepped by hand: knows vLLM's scheduler, no model runner (runner.py) and no pair.

vLLM's own step is schedule, execute, sample, update. Here the caller decides which tokens are sampled, and passes the
step from one method to the next as a value (steps.py): `schedule` gives a `ScheduledStep`, `execute` an `ExecutedStep`,
`sample` a `SampledStep`, which `update` takes. Successive steps overlap, so that the device stays busy: the next may
be scheduled while the device executes this one, as in vLLM's asynchronous scheduling, and the scheduler may be updated
after the next one was executed. `defer` takes back a request that is ready but gets no token (docs/vllm.md).

A draft is fed to the model before it is accepted. The drafting core samples placeholders in place of tokens; real ids
and acceptance counts stay on the device (`DeviceTokens`), and `replace_placeholders` writes the ids back once the host
has them. The verifying core schedules draft slots, as in vLLM's own speculative decoding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from midlogit.decide.base import LogitRows
from midlogit.engines.vllm.adapters import Adapter, leave_head, load_adapter
from midlogit.engines.vllm.blocks import skip_idle_searches
from midlogit.engines.vllm.internals import require_core
from midlogit.engines.vllm.observer import StepClock
from midlogit.engines.vllm.runner import DeviceTokens, Runner
from midlogit.engines.vllm.runner_v1 import RunnerV1
from midlogit.engines.vllm.runner_v2 import RunnerV2
from midlogit.engines.vllm.states import BlockHasher, TextStates, apart_from
from midlogit.engines.vllm.steps import ExecutedStep, SampledStep, ScheduledStep
from midlogit.errors import ModelUnavailable, first_line

PLACEHOLDER = (0,)  # sampled in place of a token whose id only the device knows


class Core:
    """One model in one vLLM engine core.

    Args:
        model: folder or hub id.
        dtype: as vLLM names it.
        kv_cache_bytes: size of the KV cache.
        memory_share: share of the device for weights, activations and cache together; vLLM checks that it is free.
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of a sequence, None for the model's own limit.
        draft_lengths: the numbers of drafts above 0 that a step may read, in order; of a drafting core, guesses.
        options: further EngineArgs.
        adapter: on the model, for all requests.

    Attributes:
        draft_lengths: see above.
        texts: the hidden states of texts that it has read.
        clock: times the four parts of a step, while it is on.

    Raises:
        ModelUnavailable: vLLM cannot load or run the model, in its own words.
        UnsupportedVersion: this vLLM lacks something that is used here.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        kv_cache_bytes: int,
        memory_share: float,
        max_num_seqs: int,
        max_model_len: int | None,
        draft_lengths: Sequence[int],
        options: Mapping[str, Any],
        adapter: Adapter | None = None,
    ) -> None:
        from vllm import envs
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.interface import PauseState
        from vllm.v1.worker import workspace

        arguments = {
            "dtype": dtype,
            "gpu_memory_utilization": memory_share,
            "kv_cache_memory_bytes": kv_cache_bytes,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "async_scheduling": False,  # the model runner's: tokens come from here, not its own sampler
            "scheduler_cls": AsyncScheduler,
            "disable_log_stats": True,
            "skip_tokenizer_init": True,
        }
        runner_class = RunnerV2 if envs.VLLM_USE_V2_MODEL_RUNNER else RunnerV1
        if draft_lengths:
            arguments["speculative_config"] = runner_class.draft_slots(draft_lengths)
        if adapter is not None:
            arguments |= adapter.options
        self._core = _make_engine_core(model, {**arguments, **options})
        self._lora_request = adapter and load_adapter(self._core, adapter)
        self._scheduler, self._pause_states = self._core.scheduler, PauseState
        self._executor = self._core.model_executor
        require_core(self._core)

        # vLLM keeps one workspace per process, and the engine that is made last replaces it.
        self._workspaces, self._workspace = workspace, workspace._manager
        self._num_salts = 0  # what later requests share no prefix of earlier ones by

        # Draft slots are asked for step by step, not by the scheduler itself.
        self._scheduler.num_spec_tokens = 0
        self._scheduler._spec_token_placeholders = []
        self._scheduler.dynamic_sd_lookup = None

        skip_idle_searches(self._scheduler)

        self.draft_lengths = draft_lengths
        self._runner: Runner = runner_class(self._executor, draft_lengths, max_num_seqs)
        if adapter is not None:
            leave_head(self._runner.model)
        self.texts = TextStates(self._runner)
        self.clock = StepClock()

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def is_empty(self) -> bool:
        """Whether the scheduler holds no request, waiting or running."""
        scheduler = self._scheduler
        return not (scheduler.requests or scheduler.running or len(scheduler.waiting))

    @property
    def free_blocks(self) -> int:
        """KV cache blocks that no request holds."""
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def blocks(self) -> int:
        """KV cache blocks in all that requests can hold."""
        block_pool = self._scheduler.kv_cache_manager.block_pool
        return int(block_pool.num_gpu_blocks) - 1  # vLLM keeps one for itself

    @property
    def running_keys(self) -> set[str]:
        """The running requests."""
        return {request.request_id for request in self._scheduler.running}

    def add(self, key: str, prompt_ids: Collection[int], max_tokens: int) -> None:
        """Adds a request to the waiting queue; vLLM itself ends it after `max_tokens` tokens."""
        self._add(key, prompt_ids, max_tokens, self._core.request_block_hasher)

    def add_text(self, key: str, text_ids: Sequence[int], given: int) -> None:
        """Adds a text to the waiting queue, whose request ends as soon as its prompt is computed.

        Args:
            given: how many of the last ids are scored; kept are the hidden states at the tokens before each.
        """
        first = len(text_ids) - 1 - given
        number = self.texts.add(key, first, given)
        hasher = self._core.request_block_hasher
        if hasher is not None:
            # What is kept must be computed here, and cannot come from blocks of other requests.
            shared = first // self._scheduler.block_size
            hasher = apart_from(hasher, shared, number)
        self._add(key, text_ids[:-1], 1, hasher)

    def _add(
        self, key: str, prompt_ids: Collection[int], max_tokens: int, hasher: BlockHasher | None
    ) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request = Request(
            request_id=key,
            prompt_token_ids=list(prompt_ids),
            sampling_params=SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
            ),
            pooling_params=None,
            lora_request=self._lora_request,
            cache_salt=self._prefix_salt,
            block_hasher=hasher,
        )
        self._core.add_request(request)

    def abort(self, keys: Collection[str]) -> None:
        """Ends requests, waiting or running; leaves out those that have already ended."""
        if keys:
            self._core.abort_requests(list(keys))
            self.texts.drop(keys)

    def can_draft(self, num_drafts: int) -> bool:
        """Whether the next steps are certain to compute one token, then `num_drafts` drafts, of each running request.

        They must admit no other request and preempt none.
        """
        scheduler, running = self._scheduler, self._scheduler.running
        is_full = len(running) >= scheduler.max_num_running_reqs
        blocks_each = 1 + (1 + num_drafts) // scheduler.block_size
        return (
            (is_full or not scheduler.waiting)
            and len(running) * (1 + num_drafts) <= scheduler.max_num_scheduled_tokens
            and len(running) * blocks_each <= self.free_blocks
            and all(_remaining_tokens(request) == 1 for request in running)
        )

    def schedule(self, num_drafts: int = 0) -> ScheduledStep:
        """Schedules the next step, as if every ready request that is not deferred had got a token.

        Args:
            num_drafts: slots after the last token of every running request; above 0 only where `can_draft`.
        """
        with self.clock.part("schedule"):
            if num_drafts:
                for request in self._scheduler.running:
                    request.spec_token_ids = [0] * num_drafts
            return ScheduledStep(self._scheduler.schedule(), num_drafts)

    def schedule_running(self, num_drafts: int = 0) -> ScheduledStep:
        """Like `schedule`, for the running requests only: it admits none."""
        self._scheduler.set_pause_state(self._pause_states.PAUSED_NEW)
        step = self.schedule(num_drafts)
        self._scheduler.set_pause_state(self._pause_states.UNPAUSED)
        return step

    def execute(
        self, step: ScheduledStep, device_tokens: DeviceTokens | None = None
    ) -> ExecutedStep:
        """Enqueues the forward pass of a step, without waiting for it.

        Args:
            device_tokens: input tokens of the step whose ids are not on the host yet.
        """
        with self.clock.part("execute"):
            self._workspaces._manager = self._workspace
            executed = self._runner.execute(step, device_tokens)
            self._core.abort_requests(
                self.texts.collect(step.scheduler_output.num_scheduled_tokens)
            )
            return executed

    def empty_logits(self) -> Tensor:
        """One row as wide as the model's logits and of their type, of no particular numbers."""
        return self._runner.empty_logits()

    def logits_of(self, states_NH: Tensor) -> Tensor:
        """Enqueues the head of the model: its raw logits at N hidden states."""
        self._workspaces._manager = self._workspace
        return self._runner.model.compute_logits(states_NH)  # type: ignore[operator, no-any-return]

    def logit_rows(
        self, step: ExecutedStep, keys: Sequence[str], num_positions: int = 1
    ) -> LogitRows:
        """The raw logits of ready requests of the step that was executed last, until it is sampled.

        Args:
            num_positions: rows of each request: after its last token and after the drafts that follow. The result has
                them position by position.
        """
        rows = [step.rows[key] + n for n in range(num_positions) for key in keys]
        return LogitRows(self._runner.logits_RV, rows)

    def defer(self, keys: Collection[str]) -> None:
        """Takes ready requests of the executed step back, which get no token: their last token is computed again.

        Comes before the next step is scheduled.
        """
        for key in keys:
            request = self._scheduler.requests.get(key)
            # A preempted request starts over anyway.
            if request is not None and request.num_computed_tokens:
                request.num_computed_tokens -= 1
                request.num_output_placeholders -= 1

    def sample(self, step: ExecutedStep, tokens: Mapping[str, Sequence[int]]) -> SampledStep:
        """Gives the model runner the tokens of a step; a ready request without tokens gets none."""
        with self.clock.part("sample"):
            output = step.runner_output or self._runner.sample(step, tokens)
            return SampledStep(step.scheduled, output)

    def sample_placeholder(self, step: ExecutedStep, keys: Collection[str]) -> SampledStep:
        """Samples placeholders for these requests, as if all drafts were accepted: a step can follow that is fed the
        real tokens.

        Of successive steps that sample placeholders only the last is updated, after `replace_placeholders`.
        """
        return self.sample(step, dict.fromkeys(keys, PLACEHOLDER * (1 + step.scheduled.num_drafts)))

    def replace_placeholders(
        self, step: SampledStep, tokens: Mapping[str, Sequence[int]], count: int
    ) -> None:
        """Writes tokens in the place of a step's placeholders and those of the steps before it; `update` follows.

        The next step may have been executed already.

        Args:
            tokens: what was sampled for each request, from 1 to `count` tokens.
            count: placeholders of each request in successive steps.
        """
        further = count - 1 - step.scheduled.num_drafts  # of the steps before
        scheduled, output = step.scheduled.scheduler_output, step.runner_output
        replaced: dict[str, Sequence[int]] = {}
        for place, key in enumerate(output.req_ids):
            if output.sampled_token_ids[place]:  # else it got no placeholder
                replaced[key] = output.sampled_token_ids[place] = list(tokens.get(key, ()))
        self._runner.replace_placeholders(replaced, count)

        if count > 1:  # to the scheduler it was one step that verified its drafts
            for key in replaced:
                scheduled.num_scheduled_tokens[key] += further
                scheduled.scheduled_spec_decode_tokens[key] = [0] * (count - 1)

    def update(self, step: SampledStep) -> None:
        """Tells the scheduler which tokens were sampled."""
        with self.clock.part("update"):
            self._scheduler.update_from_output(step.scheduled.scheduler_output, step.runner_output)

    def discard(self, step: ExecutedStep) -> None:
        """Ends an executed step without tokens: the last token of its ready requests is computed again."""
        self.defer(step.rows)
        self.update(self.sample(step, {}))

    def preempt_all(self) -> None:
        """Has all running requests computed from their first token on; comes while no step is under way."""
        self._scheduler.reset_prefix_cache(reset_running_requests=True)

    def forget_prefixes(self) -> None:
        """Keeps later requests from blocks of earlier ones, which running requests may go on using."""
        self._num_salts += 1

    @property
    def _prefix_salt(self) -> str | None:
        return str(self._num_salts) if self._num_salts else None

    @property
    def has_adapter(self) -> bool:
        """Whether requests are answered with an adapter on the model."""
        return self._lora_request is not None

    @property
    def transfer_backend(self) -> str | None:
        """How the worker receives weights from a trainer; None where it does not."""
        config = self._core.vllm_config.weight_transfer_config
        return None if config is None else str(config.backend)

    @property
    def is_receiving(self) -> bool:
        """Whether the worker is in an update that began and was not finished."""
        return bool(self._executor.driver_worker.worker._weight_update_active)

    def call_worker(self, method: str, **arguments: Any) -> None:
        """Calls a method of the worker, under the configuration of this core."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._core.vllm_config):
            self._executor.collective_rpc(method, kwargs=arguments)

    def weights(self) -> Iterable[Tensor]:
        """The model's weights as vLLM holds them, fused ones among them."""
        return self._runner.model.parameters()

    def repack_head(self) -> None:
        """Packs the head anew for the CPU: of a tied one vLLM's loader leaves the old packed copy in place."""
        if self.device.type != "cpu":
            return
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self._runner.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def close(self) -> None:
        """Frees the model."""
        self._core.shutdown()


def _remaining_tokens(request: Any) -> int:
    """Number of tokens of a request, placeholders included, that are not computed yet."""
    return int(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens)


def _make_engine_core(model: str, arguments: Mapping[str, Any]) -> Any:
    """Loads the model into vLLM's EngineCore.

    Raises:
        ModelUnavailable: vLLM cannot load or run it.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    arguments = {"load_format": "safetensors", **arguments}
    try:
        config = EngineArgs(model=model, **arguments).create_engine_config(UsageContext.LLM_CLASS)
        return EngineCore(config, Executor.get_class(config), log_stats=False)
    except Exception as error:  # a damaged file fails in many ways
        raise ModelUnavailable(f"vLLM cannot run {model}: {first_line(error)}") from error
