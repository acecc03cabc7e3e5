"""LoRA adapters on either side: what is drawn is drawn as from merged weights; what cannot be applied is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from midlogit import InvalidRequest, ModelUnavailable, Pair, SamplingParams
from midlogit.cli.loading import InProcess, PairOptions, parse_engine_args, source_of
from midlogit.engines.vllm import opening
from midlogit.engines.vllm.adapters import Adapter
from midlogit.models.checkpoint import Checkpoint
from tests.adapters import PREFIX, merge, shapes_of, write_adapter
from tests.conftest import BASE, TEACHER
from tests.questions import QUESTIONS
from tests.vllm.conftest import BASE_TOKEN, BLOCK, TEACHER_TOKEN, open_pair, require_empty
from tests.vllm.test_engine import BASE_PROMPTS, PROMPTS, require_equal

SIDES = {"base": BASE, "teacher": TEACHER}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        side: write_adapter(folder / side, model, seed=seed)
        for seed, (side, model) in enumerate(SIDES.items())
    }


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merged")
    return {side: merge(folder / side, model, adapters[side]) for side, model in SIDES.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's adapters on a GPU take no float32")
@pytest.mark.parametrize(
    ("on", "speculation"),
    [(("base",), 3), (("teacher",), "off"), (("base", "teacher"), 3)],
    ids=["base_drafting", "teacher_lock_step", "both_drafting"],
)
def test_tokens_and_scores_are_those_of_merged_weights(
    pair: Pair,
    adapters: dict[str, Path],
    merged: dict[str, Path],
    on: tuple[str, ...],
    speculation: int | str,
) -> None:
    """In chunks and preempted, with prefixes shared; float32 at temperature 0."""
    asked = SamplingParams.preset("exploratory", temperature=0, max_tokens=30)
    prompts, base_prompts = PROMPTS[:8], BASE_PROMPTS[:8]
    models = [merged[side] if side in on else model for side, model in SIDES.items()]
    with Pair.local(*models, device="cpu", dtype="float32") as local:
        expected = local.generate(prompts, asked, base_prompts=base_prompts)
        expected_scores = local.score(QUESTIONS[:3])
    plain = pair.generate(prompts, asked, base_prompts=base_prompts)
    changed = sum(a.token_ids != b.token_ids for a, b in zip(plain, expected, strict=True))
    assert changed > len(prompts) // 2  # the adapter does something

    caches = (16 * BLOCK * BASE_TOKEN, 12 * BLOCK * TEACHER_TOKEN)
    with open_pair(
        max_num_seqs=16,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=caches,
        speculation=speculation,
        **{f"{side}_lora": adapters[side] for side in on},
    ) as opened:
        for _ in range(2):
            require_equal(opened.generate(prompts, asked, base_prompts=base_prompts), expected)
        for ours, theirs in zip(opened.score(QUESTIONS[:3]), expected_scores, strict=True):
            assert ours.diagnostics.logprobs == pytest.approx(theirs.diagnostics.logprobs, abs=1e-3)
        if "base" in on:
            weights = load_file(models[0] / "model.safetensors")
            with pytest.raises(
                InvalidRequest, match="base with an adapter cannot be given weights"
            ):
                opened.update_base(weights.items())
        require_empty(opened)


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def stored(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return rewrite


Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"
FAULTS = {
    "no_config": (without_config, "holds no adapter_config.json. Give the folder of an adapter"),
    "no_weights": (without_weights, "There is no .*adapter_model.safetensors"),
    "other_kind": (configured(peft_type="IA3"), "of the kind IA3, not LORA. Merge it"),
    "no_rank": (configured(r=0), "adapter_config.json cannot be read: LoRA rank"),
    "whole_modules": (
        configured(modules_to_save=["embed_tokens"]),
        r"replaces whole modules \(modules_to_save: embed_tokens\). Merge it",
    ),
    "dora": (configured(use_dora=True), "vLLM cannot apply .*DoRA. Merge it"),
    "biases": (configured(bias="all"), "vLLM cannot apply .*bias"),
    "other_rank": (configured(r=8), "down_proj with rank 4, and by adapter_config.json it is 8"),
    "added_tokens": (
        stored(lambda t: t.update({f"{PREFIX}model.embed_tokens.weight": torch.zeros(9, 4)})),
        "holds .*embed_tokens.weight: only linear layers .* no embedding and no added token",
    ),
    "head": (
        stored(lambda t: t.update({f"{PREFIX}lm_head.lora_A.weight": torch.zeros(4, 192)})),
        "holds .*lm_head.lora_A.weight: only linear layers below the head",
    ),
    "half": (stored(lambda t: t.pop(f"{Q_PROJ}.lora_B.weight")), "only one of A and B of model.l"),
    "other_shape": (
        stored(lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 96)})),
        r"changes model.layers.0.self_attn.q_proj by \[192, 4\] times \[4, 96\], and that .* \[192",
    ),
    "other_layer": (
        stored(
            lambda t: t.update(
                {
                    f"{PREFIX}model.layers.9.mlp.up_proj.lora_{side}.weight": torch.zeros(4, 4)
                    for side in "AB"
                }
            )
        ),
        "changes model.layers.9.mlp.up_proj, which .*base does not have",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_cannot_be_applied_is_refused(tmp_path: Path, fault: str) -> None:
    damage, says = FAULTS[fault]
    adapter = write_adapter(tmp_path / "adapter", BASE)
    damage(adapter)
    with pytest.raises(ModelUnavailable, match=says) as refused:
        Pair.vllm(base_lora=adapter)
    assert "\n" not in str(refused.value)


def test_ranks_are_those_that_vllm_has(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(BASE)
    adapter = Adapter.open(write_adapter(tmp_path / "rank_9", BASE, rank=9), checkpoint)
    assert adapter.most_rank == 16
    linear = sum(sum(shape) for shape in shapes_of(BASE).values())
    assert adapter.weights >= 16 * linear
    with pytest.raises(ModelUnavailable, match="has rank 513, and vLLM takes at most 512"):
        Pair.vllm(base_lora=write_adapter(tmp_path / "rank_513", BASE, rank=513))


def test_the_adapter_of_the_other_model_is_refused(adapters: dict[str, Path]) -> None:
    with pytest.raises(ModelUnavailable, match=r"and that of .*teacher is \[256, 640\]"):
        Pair.vllm(teacher_lora=adapters["base"])


def test_a_base_with_an_adapter_takes_no_weights(adapters: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match="A base with an adapter cannot receive weights"):
        Pair.vllm(base_lora=adapters["base"], weight_transfer_config={"backend": "nccl"})


@pytest.mark.parametrize("side", ["base", "teacher"])
def test_an_adapter_in_float32_on_a_gpu_is_refused(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Else the first request would end the engine. Before anything is loaded."""
    monkeypatch.setattr(opening, "_has_gpu", lambda: True)
    refused = rf"bfloat16 and float16 only, and the {side} is in float32\..* dtype bfloat16"
    with pytest.raises(InvalidRequest, match=refused):
        open_pair(**{f"{side}_lora": adapters[side]})


def test_a_job_knows_its_adapters(adapters: dict[str, Path]) -> None:
    """By content: the same numbers elsewhere are the same adapter."""
    facts = []
    for base, teacher in (("base", None), ("teacher", None), (None, "base"), (None, None)):
        common = {
            "base_lora": base and str(adapters[base]),
            "teacher_lora": teacher and str(adapters[teacher]),
        }
        given = parse_engine_args(common, None, None, None)
        source = source_of(PairOptions(in_process=InProcess("vllm", engine_args=given)))
        with source.mixing() as mixing:
            facts.append(source.facts(mixing))
    assert all(one != other for one, other in itertools.combinations(facts, 2))
    assert facts[0]["base"]["lora"] == facts[2]["teacher"]["lora"] is not None
    assert "lora" not in facts[3]["base"]
