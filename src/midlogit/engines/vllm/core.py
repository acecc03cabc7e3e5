"""One vLLM engine core, stepped by hand: the only module that knows vLLM's internals; knows no pair and no q*.

vLLM's own step is schedule, execute, sample, update. Here the caller stands between execute and sample, and the parts
come in an order that keeps the device busy: `plan` schedules a step while the device runs the one before, as vLLM's
asynchronous scheduler can; `take` hands the drawn tokens to the model runner, and `launch` enqueues the planned
forward at once; `settle` tells the scheduler afterwards. A request that is ready but gets no token is put back by
`hold` to where its last token is computed again (docs/vllm.md).

A draft is a token that is computed before it is known to stay. The side that drafts goes on with provisional tokens,
is fed the drafts on the device, there also learns how many of them stayed, and `correct` puts those in their place; the
side that reads them plans with draft slots, as vLLM's own speculative decoding has them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midlogit.errors import InvalidRequest, ModelUnavailable, UnsupportedVersion
from midlogit.extras import require

OLDEST, NEWEST = (0, 24), (0, 32)  # minor versions; the tests run the newest, docs/vllm.md says what ran the oldest

# What vLLM may not be told, and why.
OWN = "midlogit sets it: both engines are stepped by hand, in lock-step"
PARALLEL = "both models share one process and one device, and vLLM's parallel groups belong to the process"
REFUSED = {
    "async_scheduling": OWN,
    "scheduler_cls": OWN,
    "speculative_config": "vLLM would verify drafts against one of the two models; q* has a sampler of its own",
    "structured_outputs_config": "its masks are for one model's logits; use stop, stop_token_ids or special_token_ids",
    "logits_processors": "they change the logits of one of the two models alone",
    "kv_transfer_config": "blocks of the two caches must be computed here",
    "enable_lora": "adapters are chosen for each request of one model; merge the adapter into the weights",
    "tensor_parallel_size": PARALLEL,
    "pipeline_parallel_size": PARALLEL,
    "data_parallel_size": PARALLEL,
    "device": PARALLEL,
    "distributed_executor_backend": OWN,
    "skip_tokenizer_init": OWN,
    "scheduling_policy": "requests must be taken in the same order on both sides",
    "gpu_memory_utilization": "give it to the pair: it is split between the two",
    "kv_cache_memory_bytes": "give it to the pair, as (base, teacher)",
}


@dataclass(frozen=True, slots=True)
class Fed:
    """Tokens of a forward that only the device knows, of N requests.

    Attributes:
        keys: the requests.
        tokens_NQ: the last Q tokens that the forward computes of each.
        surplus_N: how many tokens each has less than its provisional ones, where that is not known here yet.
    """

    keys: Sequence[str]
    tokens_NQ: Tensor
    surplus_N: Tensor | None = None


PROVISIONAL = (0,)  # what a drafting side takes in place of a token that only the device knows
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences for which reading drafts has CUDA graphs


class NoDrafts:
    """The proposer that vLLM is told of: drafts come from the other model."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        pass

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[] for _ in sampled_token_ids]


def require_vllm() -> str:
    """The version of the installed vLLM.

    Raises:
        MissingExtra: vLLM is not installed.
        UnsupportedVersion: a version that this module does not know.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Both must be set before vLLM reads them: engine cores in this process, and the model runner that is known here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    version = str(require("vllm", "vllm").__version__)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers <= NEWEST:
        known = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise UnsupportedVersion(
            f"vLLM {version} is installed; the in-process engine knows {known}.", "Run: pip install 'vllm==0.32.*'"
        )
    return version


def reads_drafts(version: str) -> bool:
    """Whether this vLLM reads drafts here; the CPU kernels of 0.24 lack an argument that its own warm-up gives them."""
    return torch.cuda.is_available() or not version.startswith("0.24.")


def require_options(options: Mapping[str, Any]) -> None:
    """Checks options that go to vLLM's EngineArgs.

    Raises:
        InvalidRequest: an option that two engines in lock-step cannot honour, or that vLLM does not have.
    """
    from vllm.engine.arg_utils import EngineArgs

    for name in options:
        if name in REFUSED:
            raise InvalidRequest(f"The vLLM option {name} cannot be used here: {REFUSED[name]}.")
        if name not in EngineArgs.__dataclass_fields__:
            raise InvalidRequest(f"vLLM has no option {name!r}.", "Use the names of vLLM's EngineArgs.")


class Core:
    """One model in one vLLM engine core.

    Args:
        model: folder or hub id.
        dtype: as vLLM names it.
        kv_cache_bytes: size of the KV cache.
        memory_share: of the device, that weights, activations and cache together may take; vLLM checks it is free.
        max_num_seqs: most sequences that run at once. max_model_len: most tokens of a sequence, None for the model's.
        reads: the numbers of drafts that one step may read besides none, in order; empty for a side that reads none.
        options: further EngineArgs.

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
        reads: Sequence[int],
        options: Mapping[str, Any],
    ) -> None:
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.interface import PauseState
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor import Executor
        from vllm.v1.outputs import SamplerOutput
        from vllm.v1.request import Request
        from vllm.v1.worker import workspace

        arguments = {
            "dtype": dtype,
            "gpu_memory_utilization": memory_share,
            "kv_cache_memory_bytes": kv_cache_bytes,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "async_scheduling": False,  # of the runner: tokens come from here, not from its own sampler
            "scheduler_cls": AsyncScheduler,
            "disable_log_stats": True,
            "skip_tokenizer_init": True,
        }
        if reads:
            proposer = f"{NoDrafts.__module__}.{NoDrafts.__qualname__}"
            arguments["speculative_config"] = {
                "method": "custom_class", "model": proposer, "num_speculative_tokens": reads[-1],
            }  # fmt: skip
        try:
            config = EngineArgs(model=model, **{**arguments, **options}).create_engine_config(UsageContext.LLM_CLASS)
            self._core: Any = EngineCore(config, Executor.get_class(config), log_stats=False)
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelUnavailable(f"vLLM cannot run {model}: {reason}") from error
        self.max_model_len = int(config.model_config.max_model_len)
        self._make_request, self._make_params, self._make_sampled = Request, SamplingParams, SamplerOutput
        self._scheduler, self._pause = self._core.scheduler, PauseState
        self._executor = self._core.model_executor
        self._runner = self._executor.driver_worker.worker.model_runner
        self._require_internals()
        # vLLM keeps one workspace a process, and the engine that is made last replaces it.
        self._workspaces, self._workspace = workspace, workspace._manager
        self._tokens_RW: Tensor | None = None
        self._runner._sample = lambda logits, metadata: self._make_sampled(self._tokens_RW, None)
        self._runner._to_list = Tensor.tolist  # the tokens are in main memory; vLLM's own would wait for the device
        self._planned: Any = None  # vLLM's SchedulerOutput of the next step, of the launched one, of the taken one
        self._launched: Any = None
        self._taken: tuple[Any, Any] = None, None
        self._output: Any = None  # vLLM's ModelRunnerOutput of the launched step, once there is one
        self._ready: dict[str, int] = {}
        self._planned_drafts = 0
        self._provisional = 0  # steps since the last that the scheduler was told of
        self._fed: Fed | None = None
        self._fill_inputs, self._runner._prepare_input_ids = self._runner._prepare_input_ids, self._feed
        # Draft slots are asked for step by step, not by the scheduler itself.
        self._scheduler.num_spec_tokens = 0
        self._scheduler._spec_token_placeholders = []
        if self.device.type == "cuda":
            # Guards the buffers that a forward's inputs are copied from, of which a drafting side is several ahead.
            self._runner.prepare_inputs_event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._graphs = {self._runner.uniform_decode_query_len: self._runner.cudagraph_dispatcher}
        for drafts in (0, *reads)[:-1]:
            self._capture(1 + drafts, max_num_seqs)

    def _capture(self, tokens: int, max_num_seqs: int) -> None:
        """Captures CUDA graphs for steps of so many tokens a sequence; vLLM has them for one number."""
        runner, known = self._runner, self._runner.cudagraph_dispatcher
        mode = known.cudagraph_mode
        if mode.decode_mode().name != "FULL" or not mode.separate_routine():
            return
        dispatcher = type(known)(runner.vllm_config)
        config = dispatcher.compilation_config = copy.copy(known.compilation_config)
        most = known.compilation_config.max_cudagraph_capture_size
        sizes = [tokens * batch for batch in BATCHES if batch <= max_num_seqs and tokens * batch <= most]
        config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = sizes, sizes[-1]
        dispatcher.uniform_decode_query_len = tokens
        dispatcher.initialize_cudagraph_keys(mode, tokens)
        for kind, keys in dispatcher.cudagraph_keys.items():
            if kind.name == "PIECEWISE":
                keys.clear()  # vLLM has those
        self._graphs[tokens] = dispatcher
        with self._graphs_of(tokens):
            runner.capture_model()

    def _require_internals(self) -> None:
        """Checks by name what the methods below lean on."""
        used = {
            "EngineCore": (self._core, "add_request", "abort_requests", "request_block_hasher", "shutdown"),
            "Scheduler": (self._scheduler, "schedule", "update_from_output", "requests", "running", "waiting"),
            "Executor": (self._executor, "execute_model", "sample_tokens"),
            "GPUModelRunner": (
                self._runner, "execute_model_state", "input_batch", "discard_request_mask", "_sample", "_to_list",
                "_prepare_input_ids", "input_ids", "requests", "cudagraph_dispatcher", "uniform_decode_query_len",
                "prepare_inputs_event", "num_computed_tokens", "seq_lens", "positions", "req_indices",
                "query_start_loc", "use_async_spec_decode",
            ),
        }  # fmt: skip
        missing = [f"{owner}.{n}" for owner, (thing, *names) in used.items() for n in names if not hasattr(thing, n)]
        if missing or self._core.async_scheduling or self._core.batch_queue is not None:
            found = ", ".join(missing) or "synchronous scheduling"
            raise UnsupportedVersion(f"This vLLM lacks {found}.", "Run: pip install 'vllm==0.32.*'")

    @property
    def device(self) -> torch.device:
        return torch.device(self._runner.device)

    @property
    def free_blocks(self) -> int:
        """KV cache blocks that no request holds."""
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def blocks(self) -> int:
        """KV cache blocks in all that requests can hold."""
        return int(self._scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1  # vLLM keeps one for itself

    def add(self, key: str, prompt_ids: Collection[int], max_tokens: int) -> None:
        """Takes a request into the waiting line; vLLM itself ends it after `max_tokens` tokens."""
        params = self._make_params(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        request = self._make_request(
            request_id=key,
            prompt_token_ids=list(prompt_ids),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self._core.request_block_hasher,
        )
        self._core.add_request(request)

    def abort(self, keys: Collection[str]) -> None:
        """Ends requests, waiting or running; those that have ended already are left out."""
        if keys:
            self._core.abort_requests(list(keys))

    @property
    def keys(self) -> set[str]:
        """The running requests."""
        return {request.request_id for request in self._scheduler.running}

    @property
    def computes_one_each(self) -> bool:
        """Whether the launched step computes one token of each of its requests."""
        return self._launched is not None and all(n == 1 for n in self._launched.num_scheduled_tokens.values())

    def can_draft(self, drafts: int) -> bool:
        """Whether the next steps surely compute one token and then so many drafts of every running request, and
        take in no other request."""
        scheduler, running = self._scheduler, self._scheduler.running
        full = len(running) >= scheduler.max_num_running_reqs
        blocks = 1 + (1 + drafts) // scheduler.block_size
        return (
            (full or not scheduler.waiting)
            and len(running) * (1 + drafts) <= scheduler.max_num_scheduled_tokens
            and len(running) * blocks <= self.free_blocks
            and all(r.num_tokens + r.num_output_placeholders - r.num_computed_tokens == 1 for r in running)
        )

    def plan(self, drafts: int = 0) -> None:
        """Schedules the next step, as if every ready request that is not held got a token.

        Args:
            drafts: slots for drafts behind the last token of every running request, where `can_draft`.
        """
        if self._planned is None and self._scheduler.has_requests():
            if drafts:
                for request in self._scheduler.running:
                    request.spec_token_ids = [0] * drafts
            self._planned = self._scheduler.schedule()
            self._planned_drafts = drafts

    def launch(self, fed: Fed | None = None) -> dict[str, int]:
        """Enqueues the forward of the planned step, without waiting for it.

        Args:
            fed: what is not known here of its tokens.

        Returns:
            the first row of `logits` of each request that has every token but the next one computed; those behind
            its drafts follow.
        """
        self._workspaces._manager = self._workspace
        self._launched, self._planned = self._planned, None
        self._ready = {}
        self._fed = fed
        if self._launched is not None:
            # Lengths known on the device alone are vLLM's own case of drafts under asynchronous scheduling.
            self._runner.use_async_spec_decode = fed is not None and fed.surplus_N is not None
            with self._graphs_of(1 + self._planned_drafts):
                self._output = self._executor.execute_model(self._launched)
            if self._output is None:  # else nothing was scheduled
                unready = self._runner.discard_request_mask.np
                row = 0
                for place, key in enumerate(self._runner.input_batch.req_ids):
                    if not unready[place]:
                        self._ready[key] = row
                    row += 1 + len(self._launched.scheduled_spec_decode_tokens.get(key, ()))
        return self._ready

    @contextmanager
    def _graphs_of(self, tokens: int) -> Iterator[None]:
        """Has the runner use the CUDA graphs for so many tokens a sequence, where there are some."""
        runner = self._runner
        known = runner.cudagraph_dispatcher, runner.uniform_decode_query_len
        if tokens in self._graphs:
            runner.cudagraph_dispatcher, runner.uniform_decode_query_len = self._graphs[tokens], tokens
        try:
            yield
        finally:
            runner.cudagraph_dispatcher, runner.uniform_decode_query_len = known

    def _feed(self, scheduled: Any, requests: int, total: int, ends_R: Any) -> None:
        """vLLM's filling of a forward's input ids, and over it the tokens that only the device knows."""
        self._fill_inputs(scheduled, requests, total, ends_R)
        if self._fed is None:
            return
        tokens_NQ, surplus_N = self._fed.tokens_NQ, self._fed.surplus_N
        number = self._runner.input_batch.req_id_to_index
        there = [n for n, key in enumerate(self._fed.keys) if key in number]  # the others were preempted since
        if not there:
            return
        if len(there) < len(tokens_NQ):
            chosen = self._sent(np.asarray(there, dtype=np.int64))
            tokens_NQ, surplus_N = tokens_NQ[chosen], None if surplus_N is None else surplus_N[chosen]
        rows_N = np.asarray([number[self._fed.keys[n]] for n in there], dtype=np.int64)
        places = (ends_R[rows_N][:, None] - tokens_NQ.shape[1] + np.arange(tokens_NQ.shape[1])).ravel()
        inputs, span = self._runner.input_ids.gpu, slice(places[0], places[0] + len(places))
        if np.array_equal(places, np.arange(span.start, span.stop)):  # as in most drafting steps: nothing to send
            inputs[span] = tokens_NQ.reshape(-1)
        else:
            inputs[self._sent(places)] = tokens_NQ.reshape(-1).to(inputs.dtype)
        if surplus_N is not None:
            self._move_back(self._sent(rows_N), surplus_N, requests, total)

    def _move_back(self, rows_N: Tensor, surplus_N: Tensor, requests: int, total: int) -> None:
        """Has the forward that is being prepared compute tokens of some rows so many places earlier."""
        runner = self._runner
        surplus_R = torch.zeros(requests, dtype=runner.num_computed_tokens.dtype, device=self.device)
        surplus_R[rows_N] = surplus_N.to(surplus_R.dtype)
        runner.num_computed_tokens[:requests] -= surplus_R
        runner.seq_lens[:requests] -= surplus_R
        runner.positions[:total] -= surplus_R[runner.req_indices.gpu[:total]]
        starts_R = runner.query_start_loc.gpu[: requests + 1]
        runner.input_batch.block_table.compute_slot_mapping(requests, starts_R, runner.positions[:total])

    def _sent(self, numbers: Any) -> Tensor:
        """An array on the device, sent without waiting for it."""
        there: Tensor = torch.from_numpy(numbers)
        return there.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else there

    @property
    def is_planned(self) -> bool:
        """Whether the next step is planned."""
        return self._planned is not None

    @property
    def is_launched(self) -> bool:
        """Whether a step is launched of which no tokens were taken."""
        return self._launched is not None

    @property
    def ready(self) -> dict[str, int]:
        """The first rows of the launched step, as `launch` returned them."""
        return self._ready

    @property
    def logits(self) -> Tensor:
        """Logits [requests, vocabulary] of the launched step, in the model's dtype."""
        logits_RV: Tensor = self._runner.execute_model_state.logits
        return logits_RV

    def hold(self, keys: Collection[str]) -> None:
        """Puts ready requests of the launched step back; before the next one is planned."""
        for key in keys:
            request = self._scheduler.requests.get(key)
            # A preempted request starts over anyway.
            if request is not None and request.num_computed_tokens:
                request.num_computed_tokens -= 1
                request.num_output_placeholders -= 1

    def take(self, tokens: Mapping[str, Sequence[int]]) -> None:
        """Hands the launched step's tokens to the model runner; a ready request without any gets none."""
        if self._launched is not None and self._output is None:
            batch, unready = self._runner.input_batch, self._runner.discard_request_mask.np
            width = max(map(len, tokens.values()), default=1)
            drawn_RW = np.full((len(batch.req_ids), width), -1, dtype=np.int32)
            for place, key in enumerate(batch.req_ids):
                if key in self._ready:
                    unready[place] = key not in tokens
                    drawn_RW[place, : len(tokens.get(key, ()))] = tokens.get(key, ())
            self._tokens_RW = torch.from_numpy(drawn_RW)
            self._output = self._executor.sample_tokens(None)
        self._taken = self._launched, self._output
        self._launched = self._output = None

    def go_on(self, keys: Collection[str]) -> None:
        """Takes a provisional token for these requests, so that a step can follow that is fed the real one."""
        self._provisional += 1
        self.take(dict.fromkeys(keys, PROVISIONAL))

    def plan_on(self) -> None:
        """`plan` for the requests that go on, and no others."""
        self._scheduler.set_pause_state(self._pause.PAUSED_NEW)
        self.plan()
        self._scheduler.set_pause_state(self._pause.UNPAUSED)

    def correct(self, tokens: Mapping[str, Sequence[int]]) -> None:
        """Puts what was drawn in the place of what the steps that went on took provisionally; `settle` follows.

        The step behind them may be launched already.
        """
        steps, self._provisional = self._provisional, 0
        scheduled, output = self._taken
        batch = self._runner.input_batch
        for place, key in enumerate(output.req_ids if steps else ()):
            if output.sampled_token_ids[place]:  # else none was taken
                drawn = list(tokens.get(key, ()))
                output.sampled_token_ids[place] = drawn
                # To the scheduler it was one step that read its drafts.
                scheduled.num_scheduled_tokens[key] += steps - 1
                scheduled.scheduled_spec_decode_tokens[key] = [0] * (steps - 1)
                known = self._runner.requests[key].output_token_ids
                known[len(known) - steps :] = drawn
                row = batch.req_id_to_index.get(key)
                if row is not None:  # else it was preempted since
                    start = batch.num_tokens_no_spec[row] - steps
                    batch.token_ids_cpu[row, start : start + len(drawn)] = drawn
                    batch.num_tokens_no_spec[row] = start + len(drawn)

    def settle(self) -> None:
        """Tells the scheduler of the tokens that were taken."""
        scheduled, output = self._taken
        if scheduled is not None:
            self._scheduler.update_from_output(scheduled, output)
        self._taken = None, None

    def close(self) -> None:
        """Frees the model."""
        self._core.shutdown()
