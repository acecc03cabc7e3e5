"""Rows that verl's own worker makes with the agent loop: drawn from q*, and weighed by exactly π/q*."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

from midlogit import InvalidRequest
from tests.conftest import TEACHER
from tests.http.conftest import Urls
from tests.http.proxy import Proxy
from tests.verl.laws import log_q, logits
from tests.verl.runs import LENGTH, PROMPTS, WIDTH, Replica, configured, roll_out

CUSTOM = "actor_rollout_ref.rollout.custom.midlogit"
WHOLE = f"{CUSTOM}.max_tv_bound=1e-9"  # lists widen to the whole vocabulary, so that q* is exact
NARROW = f"{CUSTOM}.max_tv_bound=1"  # lists stay short


def run(urls: Urls, *overrides: str, **how: object) -> DataProto:
    config = configured(urls.teacher, *overrides)

    async def rolled() -> DataProto:
        return await roll_out(config, Replica(urls.base), **how)

    return asyncio.run(rolled())


def test_verl_knows_the_loop_by_its_name() -> None:
    target = _agent_loop_registry["midlogit"]["_target_"]
    assert target == "midlogit.integrations.verl.agent_loop.MidlogitAgentLoop"


def test_64_rollouts_at_once_are_weighed_by_the_policy_over_q(urls: Urls) -> None:
    batch = run(urls, NARROW, n=8)
    mask, q = batch.batch["response_mask"], batch.batch["rollout_log_probs"]
    assert mask.shape == q.shape == (64, LENGTH)
    assert list(batch.non_tensor_batch["min_global_steps"]) == [0] * 64
    assert list(batch.non_tensor_batch["max_global_steps"]) == [0] * 64

    log_pi = policy_log_probs(batch)
    for level, expected in (
        ("token", torch.exp(log_pi - q)),
        ("sequence", torch.exp(((log_pi - q) * mask).sum(1, keepdim=True)).expand_as(q)),
    ):
        weights, kept, _ = compute_rollout_correction_and_rejection_mask(
            log_pi, q, mask, rollout_is=level, rollout_is_threshold=1e9
        )
        torch.testing.assert_close(weights.batch["rollout_is_weights"], expected * mask)
        assert torch.equal(kept, mask)


def test_log_probs_are_of_q_at_the_temperature(urls: Urls) -> None:
    temperature = 0.8
    batch = run(
        urls, WHOLE, f"actor_rollout_ref.rollout.temperature={temperature}", prompts=PROMPTS[:2]
    )
    assert batch.batch["response_mask"].any()
    for row in range(2):
        prompt, response = ids_of(batch, row)
        teacher_prompt = AutoTokenizer.from_pretrained(TEACHER).apply_chat_template(
            PROMPTS[row], add_generation_prompt=True, return_dict=False
        )
        base = logits("base", prompt, response)
        teacher = logits("teacher", teacher_prompt, response)
        expected = log_q(base, teacher, temperature, nats=0.02)[range(len(response)), response]
        found = batch.batch["rollout_log_probs"][row, : len(response)]
        ends = np.isin(response, (0, 1))  # one outcome with two ids
        np.testing.assert_allclose(found[~ends], expected[~ends], atol=2e-3)


def test_the_policy_reads_what_verl_made_and_the_teacher_its_own_template(urls: Urls) -> None:
    batch = run(urls, WHOLE, prompts=PROMPTS[:1])
    prompt, response = ids_of(batch, 0)
    assert prompt == AutoTokenizer.from_pretrained(TEACHER).encode(
        f"Question: {PROMPTS[0][0]['content']}\nAnswer:"
    )

    # verl's form: row i is of token i + 1, over prompt and response.
    log_probs = batch.batch["teacher_logprobs"][0, WIDTH - 1 : WIDTH - 1 + len(response), 0]
    assert (
        batch.batch["teacher_ids"][0, WIDTH - 1 : WIDTH - 1 + len(response), 0].tolist() == response
    )
    assert batch.batch["teacher_logprobs"].shape == (1, WIDTH + LENGTH, 1)
    teacher_prompt = AutoTokenizer.from_pretrained(TEACHER).apply_chat_template(
        PROMPTS[0], add_generation_prompt=True, return_dict=False
    )
    rows = torch.log_softmax(torch.tensor(logits("teacher", teacher_prompt, response)), -1)
    expected = rows[range(len(response)), response]
    torch.testing.assert_close(log_probs, expected.float(), atol=2e-3, rtol=0)


def test_rows_over_the_bound_are_masked(urls: Urls, proxies: tuple[Proxy, Proxy]) -> None:
    for proxy in proxies:
        proxy.max_logprobs = 20
    behind = Urls(proxies[0].url, proxies[1].url)
    batch = run(behind, f"{CUSTOM}.max_tv_bound=0.05")
    bounds = np.array(batch.non_tensor_batch["tv_bound"], dtype=float)
    lengths = batch.batch["attention_mask"][:, WIDTH:].sum(1).numpy()
    kept = batch.batch["response_mask"].sum(1).numpy()
    assert (bounds > 0.05).any()
    np.testing.assert_array_equal(kept, np.where(bounds > 0.05, 0, lengths))


def test_validation_is_of_the_policy_alone(urls: Urls) -> None:
    batch = run(urls, prompts=PROMPTS[:2], validate=True)
    for row in range(2):
        prompt, response = ids_of(batch, row)
        assert response == logits("base", prompt, response).argmax(1).tolist()
    assert "teacher_logprobs" not in batch.batch


def test_a_failed_rollout_is_an_error(urls: Urls, proxies: tuple[Proxy, Proxy]) -> None:
    proxies[1].max_logprobs = 20
    behind = Urls(urls.base, proxies[1].url)
    run(behind, prompts=PROMPTS[:1])
    proxies[1].refuse = lambda body: True
    with pytest.raises(InvalidRequest, match="teacher"):
        run(behind, prompts=PROMPTS[:1])


def ids_of(batch: DataProto, row: int) -> tuple[list[int], list[int]]:
    """Prompt and response without padding."""
    mask, width = batch.batch["attention_mask"][row].bool(), batch.batch["prompts"].shape[1]
    ids = batch.batch["input_ids"][row]
    return ids[:width][mask[:width]].tolist(), ids[width:][mask[width:]].tolist()


def policy_log_probs(batch: DataProto) -> torch.Tensor:
    """What verl's actor computes: log π of each response token, 0 behind its end."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER.parent / "base", dtype=torch.float32)
    found = torch.zeros(batch.batch["responses"].shape)
    for row in range(len(found)):
        prompt, response = ids_of(batch, row)
        with torch.inference_mode():
            out = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_probs = torch.log_softmax(out, -1)[range(len(response)), response]
        found[row, : len(response)] = log_probs
    return found
