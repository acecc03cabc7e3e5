"""slime's custom generate function against a server for trainers, on samples with the fields of slime 0.3.1.

`Sample` and `consumed` have what slime's trainer reads and asserts; its own classes run in tests/clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from midlogit import Pair, SamplingParams
from midlogit.errors import InvalidRequest
from midlogit.integrations.slime import calls, generate
from midlogit.models.checkpoint import bundled
from tests.server.conftest import Live, bundled_pair, run_server
from tests.server.test_trainer_clients import checkpoint
from tests.server.test_training import changed, load, post

CHAT = [{"role": "user", "content": "What do cats like?"}]
TEMPLATED = str(bundled("teacher"))  # a tokenizer of the same ids that has a chat template
STEP = 3  # of training, whose weights the server has


class Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"


@dataclass
class Sample:
    prompt: str | list[dict[str, str]]
    group_index: int | None = 0
    index: int | None = 0
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    rollout_top_p_token_ids: list[int] | None = None
    rollout_top_p_token_offsets: list[int] | None = None
    teacher_log_probs: list[float] | None = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    status: Status = Status.PENDING


def consumed(sample: Any) -> Any:
    """The sample, as slime makes training data of it."""
    length = sample.response_length
    assert len(sample.loss_mask) == length and 0 < length < len(sample.tokens)
    assert len(sample.rollout_log_probs) == length
    if sample.rollout_top_p_token_ids is not None:
        assert len(sample.rollout_top_p_token_offsets) == length + 1
        assert sample.rollout_top_p_token_offsets[-1] == len(sample.rollout_top_p_token_ids)
    return sample


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("weights")
    settings: dict[str, Any] = {"train": True, "max_queued": None, "weights_root": root}
    with run_server(lambda: bundled_pair(8), max_num_seqs=8, **settings) as live:
        folder = checkpoint(root, STEP)
        post(live, "/update_weights_from_disk", {"model_path": str(folder), "weight_version": "3"})
        yield live
        live.wait_idle()


def arguments(live: Live, **changes: Any) -> SimpleNamespace:
    given = {
        "hf_checkpoint": str(bundled("base")),
        "rollout_external_engine_addrs": [live.url.removeprefix("http://")],
        "use_tis": True,
        "use_rollout_logprobs": False,
        "update_weight_mode": "full",
        "update_weight_transport": "disk",
    }
    return SimpleNamespace(**{**given, **changes})


def sampling(**changes: Any) -> dict[str, Any]:
    """The parameters that slime passes, with its defaults."""
    return {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 40,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        **changes,
    }


def run(args: Any, samples: list[Any], params: dict[str, Any], **options: Any) -> list[Any]:
    async def together() -> list[Any]:
        try:
            drawn = (generate(args, sample, dict(params), **options) for sample in samples)
            return await asyncio.gather(*drawn)
        finally:
            await calls._session().close()

    return asyncio.run(together())


def logprobs_of(side: str, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probabilities of a response under a model alone, as slime's trainer computes them."""
    model = load(bundled(side))
    if side == "base":
        model.load_state_dict(changed(STEP), strict=False)
    with torch.inference_mode():
        rows = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    first = len(prompt) - 1
    return [float(rows[first + k, token_id]) for k, token_id in enumerate(response)]


def split(sample: Any) -> tuple[list[int], list[int]]:
    return sample.tokens[: -sample.response_length], sample.tokens[-sample.response_length :]


def test_samples_of_text(live: Live) -> None:
    """Both models read the ids of slime's tokenizer; log q and the teacher's scores are exact."""
    samples = [Sample("Once upon a time", index=k) for k in range(6)]
    done = [consumed(sample) for sample in run(arguments(live), samples, sampling())]
    base = live.pair.mixing.base
    params = SamplingParams.preset("rollout", max_tokens=40)
    model = load(bundled("base"))
    model.load_state_dict(changed(STEP), strict=False)
    with Pair.local(model, bundled("teacher"), dtype="float32", device="cpu") as pair:
        scored = pair.score([sample.tokens for sample in done], params)

    for sample, scores in zip(done, scored, strict=True):
        prompt, response = split(sample)
        assert prompt == base.encode("Once upon a time", add_special_tokens=False)
        wanted = scores.diagnostics.logprobs[-len(response) :]
        assert sample.rollout_log_probs == pytest.approx(wanted, abs=1e-4)
        wanted = logprobs_of("teacher", prompt, response)
        assert sample.teacher_log_probs == pytest.approx(wanted, abs=1e-4)
        assert sample.weight_versions == ["3"] and sample.loss_mask == [1] * len(response)
        is_whole = sample.status == Status.COMPLETED
        assert is_whole == (response[-1] in base.stop_ids) and (is_whole or len(response) == 40)
    assert len({tuple(sample.tokens) for sample in done}) > 1


def test_each_model_reads_messages_in_its_own_template(live: Live) -> None:
    mixing = live.pair.mixing
    for prompt, metadata, theirs in (
        (CHAT, {}, mixing.teacher.encode_chat(CHAT, {})),
        ("Question:", {"teacher_prompt": CHAT}, mixing.teacher.encode_chat(CHAT, {})),
        ("Question:", {"teacher_prompt": [5, 6]}, [5, 6]),
    ):
        args = arguments(live, hf_checkpoint=TEMPLATED)
        (sample,) = run(args, [Sample(prompt, metadata=dict(metadata))], sampling())
        own, response = split(consumed(sample))
        if prompt is CHAT:
            assert own == mixing.teacher.encode_chat(CHAT, {})
        wanted = logprobs_of("teacher", theirs, response)
        assert sample.teacher_log_probs == pytest.approx(wanted, abs=1e-4)


def test_a_sample_that_was_cut_off_goes_on(live: Live) -> None:
    """As with --partial-rollout: an update aborts it, and slime gives it to the function again."""
    args = arguments(live, hf_checkpoint=TEMPLATED)

    async def cut() -> Any:
        endless = sampling(max_new_tokens=400, ignore_eos=True)
        task = asyncio.create_task(generate(args, Sample(CHAT), endless))
        while not live.rows:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(post, live, "/abort_request", {"abort_all": True})
        sample = await task
        await calls._session().close()
        return sample

    sample = asyncio.run(cut())
    assert sample.status == Status.ABORTED
    first = sample.response_length
    sample.loss_mask = [0] * first  # --mask-offpolicy-in-partial-rollout
    (sample,) = run(args, [sample], sampling(max_new_tokens=first + 20))
    prompt, response = split(consumed(sample))
    assert first < len(response) <= first + 20 and sample.loss_mask == [0] * first + [1] * (
        len(response) - first
    )
    theirs = live.pair.mixing.teacher.encode_chat(CHAT, {})
    wanted = logprobs_of("teacher", theirs, response)
    assert sample.teacher_log_probs == pytest.approx(wanted, abs=1e-4)
    assert prompt == theirs
    assert sample.status in (Status.COMPLETED, Status.TRUNCATED)


def test_evaluations_are_of_the_policy_alone(live: Live) -> None:
    (sample,) = run(arguments(live), [Sample("Once upon a time")], sampling(), evaluation=True)
    wanted = logprobs_of("base", *split(consumed(sample)))
    assert sample.rollout_log_probs == pytest.approx(wanted, abs=1e-4)
    assert sample.teacher_log_probs is None


def test_the_nucleus_is_replayed(live: Live) -> None:
    """slime renormalises the policy over each nucleus: with q* held to it the ratio keeps the mean 1."""
    asked = "Question: What do cats like?\nAnswer:"
    samples = [Sample(asked, index=k) for k in range(12)]
    args = arguments(live, midlogit_alpha_rule="equal-kl")
    done = run(args, samples, sampling(top_p=0.8, max_new_tokens=60))
    for sample in done:
        _, response = split(consumed(sample))
        ids, offsets = sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets
        for k, token_id in enumerate(response):
            assert token_id in ids[offsets[k] : offsets[k + 1]]
    assert any(sample.status == Status.COMPLETED for sample in done)


def test_a_sample_without_room_is_truncated(live: Live) -> None:
    sample = Sample("x", tokens=[5, 6, 7], response_length=2)
    (found,) = run(arguments(live), [sample], sampling(max_new_tokens=2))
    assert found.status == Status.TRUNCATED and found.tokens == [5, 6, 7]


def test_what_would_train_on_wrong_numbers_is_refused(live: Live) -> None:
    for changes, params, message in (
        ({"use_tis": False}, {}, "--use-tis"),
        ({"update_weight_transport": "nccl"}, {}, "--update-weight-transport disk"),
        ({"rollout_external_engine_addrs": None}, {}, "--rollout-external-engine-addrs"),
        ({}, {"top_k": 50}, "top_k"),
        ({}, {"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"midlogit_alpha_rule": "no-rule"}, {}, "no-rule"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            run(arguments(live, **changes), [Sample("Once")], sampling(**params))
    with pytest.raises(InvalidRequest, match="top_p"):
        run(arguments(live), [Sample("Once")], sampling(top_p=0.9), evaluation=True)
    assert run(arguments(live, use_tis=False), [Sample("Once")], sampling(), evaluation=True)
