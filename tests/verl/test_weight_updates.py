"""New weights in the middle of rollouts: what they abort is asked again, and every token is of q* of its time."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.protocol import DataProto

from tests.conftest import TEACHER
from tests.http.conftest import Urls
from tests.http.proxy import Proxy
from tests.verl.laws import log_q, logits
from tests.verl.runs import PROMPTS, Replica, configured, roll_out
from tests.verl.test_agent_loop import WHOLE, ids_of

TOLERANCE = 2e-3


def served_folder(url: str) -> Path:
    with urllib.request.urlopen(f"{url}/models") as answer:
        return Path(json.load(answer)["data"][0]["root"])


def trained(folder: Path, new: Path) -> Path:
    """A copy of a model with other weights."""
    copytree(folder, new)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] = head + 0.3 * head.std() * noise
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    return new


def test_rollouts_across_an_update(
    urls: Urls, proxies: tuple[Proxy, Proxy], tmp_path: Path
) -> None:
    base, _ = proxies
    old = served_folder(urls.base)
    new = trained(old, tmp_path / "new")
    aborted = 0

    def count(path: str, answer: Any) -> Any:
        nonlocal aborted
        choices = answer.get("choices", ())
        aborted += sum(choice["finish_reason"] == "abort" for choice in choices)
        return answer

    base.rewrite_answer = count

    async def across() -> DataProto:
        replica = Replica(base.url)
        config = configured(urls.teacher, WHOLE)
        rollouts = asyncio.create_task(roll_out(config, replica, prompts=PROMPTS[:4]))
        begun = base.calls
        while len(replica.calls) < 4 or base.calls < begun + 60:
            await asyncio.sleep(0.01)
        while not aborted:  # a call that came meanwhile waits, and is aborted
            await replica.abort_all_requests()
            await asyncio.sleep(0.05)
        await replica.load(new, 1)
        await replica.resume_generation()
        try:
            return await rollouts
        finally:
            await replica.load(old, 0)

    batch = asyncio.run(across())
    assert aborted and batch.batch["response_mask"].any(1).all()
    assert list(batch.non_tensor_batch["min_global_steps"]) == [0] * 4
    assert 1 in batch.non_tensor_batch["max_global_steps"]

    load = AutoModelForCausalLM.from_pretrained
    policies = [load(folder, dtype=torch.float32).eval() for folder in (old, new)]
    is_old, is_new = zip(*(versions(batch, row, policies) for row in range(4)), strict=True)
    for of_old, of_new in zip(is_old, is_new, strict=True):
        assert (of_old | of_new).all()
        switch = np.flatnonzero(~of_old)
        assert not len(switch) or of_new[switch[0] :].all()
    assert not np.concatenate(is_old).all() and not np.concatenate(is_new).all()


def versions(batch: DataProto, row: int, policies: list[Any]) -> list[np.ndarray]:
    """For each policy, which tokens' log-probabilities are those of its q*."""
    prompt, response = ids_of(batch, row)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher_prompt = tokenizer.apply_chat_template(
        PROMPTS[row], add_generation_prompt=True, return_dict=False
    )
    teacher = logits("teacher", teacher_prompt, response)
    found = batch.batch["rollout_log_probs"][row, : len(response)].numpy()
    ends = np.isin(response, (0, 1))
    places = range(len(response)), response
    return [
        ends
        | (
            np.abs(log_q(logits(p, prompt, response), teacher, 1.0, 0.02)[places] - found)
            < TOLERANCE
        )
        for p in policies
    ]
