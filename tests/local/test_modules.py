"""Pairs over modules that are loaded already: a trainer's model is shared, and stays as the trainer has it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from midlogit import Completion, InvalidRequest, ModelUnavailable, Pair, SamplingParams
from tests.conftest import BASE, TEACHER
from tests.questions import QUESTIONS

PARAMS = SamplingParams.preset("exploratory", max_tokens=12, seed=3)


def load(folder: Path = BASE, **config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)


def opened(base: Any, teacher: Any = TEACHER, **options: Any) -> Pair:
    return Pair.local(base, teacher, device="cpu", dtype="float32", **options)


def sampled(pair: Pair, params: SamplingParams = PARAMS) -> list[Completion]:
    done = pair.generate(QUESTIONS[:4], params, chat=True)
    assert not any(completion.error for completion in done)
    return done


def noise(model: torch.nn.Module, scale: float = 0.02) -> None:
    """Moves every weight, as a step of a trainer does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)


def step(model: Any, ids: list[int]) -> None:
    """A step of training: forward, backward, new weights."""
    model.train()
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    model.zero_grad()


def test_modules_give_what_their_folders_give(pair: Pair) -> None:
    with opened(load(), load(TEACHER)) as of_modules:
        for one, other in zip(sampled(of_modules), sampled(pair), strict=True):
            assert one.token_ids == other.token_ids
            assert one.diagnostics.logprobs == pytest.approx(other.diagnostics.logprobs, abs=1e-4)


def test_forwards_are_in_evaluation_mode_and_the_module_goes_on_training(pair: Pair) -> None:
    model = load(attention_dropout=0.5)
    model.train()
    model.model.layers[0].mlp.eval()
    model.activation_checkpointing_enable()
    before = [part.training for part in model.modules()]

    with opened(model) as shared:
        assert [c.token_ids for c in sampled(shared)] == [c.token_ids for c in sampled(pair)]
        assert [part.training for part in model.modules()] == before
        step(model, shared.mixing.base.encode(QUESTIONS[0]))


def test_weights_are_live_between_calls() -> None:
    model = load()
    model.config.rope_parameters["rope_type"] = "dynamic"
    model.config.rope_parameters["factor"] = 2.0
    with opened(model, speculation=2) as shared:
        ids = shared.mixing.base.encode(QUESTIONS[0])
        for _ in range(3):
            step(model, ids)
            (completion,) = shared.generate([ids], PARAMS)
            tokens = torch.tensor([ids + completion.token_ids])
            with torch.no_grad():
                rows = model.eval()(tokens).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            expected = [row[i].item() for row, i in zip(rows, completion.token_ids, strict=True)]
            found = completion.diagnostics.base_logprobs
            ending = completion.finish_reason == "stop"  # scored as one outcome of several ids
            keep = len(expected) - ending
            assert found[:keep] == pytest.approx(expected[:keep], abs=1e-4)


def test_a_trained_module_is_not_taken_for_the_folder_that_it_came_from() -> None:
    model = load(TEACHER)
    noise(model)
    with opened(model, TEACHER) as shared:
        (completion, *_) = sampled(shared)
        assert max(completion.diagnostics.kl_base) > 1e-3


def test_autocast_may_come_later_and_go_again(pair: Pair) -> None:
    """As accelerate wraps a model's forward when training begins."""
    model = load()
    plain = model.forward
    with opened(model) as shared:
        expected = [c.diagnostics.base_logprobs[0] for c in sampled(shared)]
        model.forward = functools.wraps(plain)(torch.autocast("cpu", torch.bfloat16)(plain))
        found = [c.diagnostics.base_logprobs[0] for c in sampled(shared)]
        assert found != expected and found == pytest.approx(expected, abs=0.1)

        layer = shared.engine.base._cache.layers[0]  # type: ignore[attr-defined]
        assert torch.bfloat16 in (layer.keys.dtype, layer.values.dtype)
        with opened(model) as opened_under_autocast:
            sampled(opened_under_autocast)

        model.forward = plain
        assert [c.diagnostics.base_logprobs[0] for c in sampled(shared)] == expected


@pytest.mark.filterwarnings("ignore::FutureWarning:peft")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(), peft.LoraConfig(r=4, lora_dropout=0.5))
    adapted.enable_input_require_grads()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.train()

    with opened(adapted, base_tokenizer=AutoTokenizer.from_pretrained(BASE)) as shared:
        of_adapter = sampled(shared)
        step(adapted, shared.mixing.base.encode(QUESTIONS[0]))
        after_a_step = sampled(shared)
    merged = adapted.merge_and_unload()
    with opened(merged) as plain:
        for one, other in zip(after_a_step, sampled(plain), strict=True):
            assert one.token_ids == other.token_ids
            assert one.diagnostics.base_logprobs == pytest.approx(
                other.diagnostics.base_logprobs, abs=1e-4
            )
    assert [c.diagnostics.logprobs for c in of_adapter] != [
        c.diagnostics.logprobs for c in after_a_step
    ]


def test_stop_ids_are_those_of_the_modules_generation_configuration() -> None:
    model = load()
    model.generation_config.eos_token_id = [5, 6]
    with opened(model) as shared:
        assert {5, 6} <= set(shared.mixing.stop_ids)


def test_refusals() -> None:
    nameless = load()
    nameless.config._name_or_path = ""
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        opened(nameless)
    with pytest.raises(InvalidRequest, match="the base is no module"):
        Pair.local(BASE, TEACHER, base_tokenizer=AutoTokenizer.from_pretrained(BASE))
    with pytest.raises(InvalidRequest, match="Only one of base and teacher"):
        Pair.local(nameless)
    with pytest.raises(ModelUnavailable, match="no causal language model"):
        opened(torch.nn.Linear(2, 2))
    with pytest.raises(ModelUnavailable, match="no causal language model"):
        opened(nameless.model)
