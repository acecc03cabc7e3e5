"""User errors are typed errors before any work; an engine that dies in the middle."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import vllm

from midlogit import (
    EngineFailure,
    InvalidRequest,
    ModelUnavailable,
    Pair,
    PairMismatch,
    PromptTooLong,
    SamplingParams,
)
from midlogit.engines.vllm import opening
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.internals import require_core
from midlogit.engines.vllm.memory import GIB, Need, split
from midlogit.engines.vllm.options import V2, require_vllm
from midlogit.engines.vllm.runner import DeviceTokens
from midlogit.engines.vllm.steps import ExecutedStep, ScheduledStep
from midlogit.errors import DoesNotFit, MissingExtra, UnsupportedVersion
from midlogit.models.checkpoint import Checkpoint
from tests.conftest import BASE, TEACHER
from tests.damage import read_header, write_header
from tests.questions import QUESTIONS
from tests.vllm.conftest import CONTEXT, open_pair


@pytest.mark.parametrize("version", ["0.23.1", "0.34.0", "1.0.0"])
def test_another_vllm_is_named_with_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(
        UnsupportedVersion, match=rf"vLLM {version} is installed; .* knows 0.24 to 0.33"
    ):
        Pair.vllm()


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0+cpu", "0.28.1.post2"])
def test_known_versions_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setenv(V2, "0")  # so that it is put back
    monkeypatch.delenv(V2)
    assert require_vllm() == version
    assert os.environ[V2] == "0"


@pytest.mark.parametrize(
    ("version", "has_triton", "says"),
    [
        ("0.31.0", True, "which is not known of vLLM 0.31.0"),
        ("0.32.0", False, "needs Triton; vLLM 0.32.0 cannot use it here"),
    ],
)
def test_model_runner_v2_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, version: str, has_triton: bool, says: str
) -> None:
    monkeypatch.setenv(V2, "1")
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", has_triton)
    with pytest.raises(UnsupportedVersion, match=f"{V2} asks for .* {says}"):
        Pair.vllm()


def test_model_runner_v2_is_taken_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(V2, "0")  # so that it is put back
    monkeypatch.delenv(V2)
    monkeypatch.setattr("midlogit.engines.vllm.options.NEWEST_V1", (0, 31))
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    require_vllm()
    assert os.environ[V2] == "1"


def test_a_vllm_that_cannot_verify_drafts_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.24.0+cpu")
    monkeypatch.delenv(V2, raising=False)
    monkeypatch.setattr(opening, "_has_gpu", lambda: False)
    with pytest.raises(InvalidRequest, match=r"vLLM 0\.24\.0\+cpu cannot read drafts on a CPU"):
        Pair.vllm(speculation=3)


@pytest.mark.parametrize("speculation", [-1, 17, "fast"])
def test_drafts_out_of_range(speculation: int | str) -> None:
    with pytest.raises(InvalidRequest, match="Use auto, off, or 0 to 16 drafts"):
        Pair.vllm(speculation=speculation)


def test_missing_vllm_is_a_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(MissingExtra, match="pip install"):
        Pair.vllm()


def test_a_cache_too_small_for_the_context_is_said_by_vllm() -> None:
    with pytest.raises(OSError, match=r"vLLM cannot run .*teacher"):
        open_pair(kv_cache_memory_bytes=(2**24, 2**16))


def test_a_vllm_without_the_internals_is_refused(
    crowded: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Privates, since the check runs while a pair opens, and a process holds only one pair.
    core = crowded.engine.cores[0]
    runner = core._runner._runner
    monkeypatch.setattr(runner, "execute_model_state", None)
    monkeypatch.delattr(runner, "execute_model_state")
    with pytest.raises(UnsupportedVersion, match=r"lacks GPUModelRunner\.execute_model_state"):
        type(core._runner)(core._executor, (), 1)

    monkeypatch.delattr(core._executor.driver_worker.worker, "_weight_update_active")
    with pytest.raises(UnsupportedVersion, match=r"lacks Worker\._weight_update_active"):
        require_core(core._core)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (
            {"speculative_config": {"method": "ngram"}},
            "speculative_config cannot be used here: .* q\\* has a sampler",
        ),
        ({"structured_outputs_config": {}}, "structured_outputs_config cannot be used here"),
        (
            {"tensor_parallel_size": 2},
            "tensor_parallel_size is 2, and .*base has 3 heads of attention",
        ),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        (
            {"base_args": {"tensor_parallel_size": 1}},
            "tensor_parallel_size cannot be used here: give it to the pair",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size cannot be used here: use tensor"),
        ({"async_scheduling": True}, "async_scheduling cannot be used here"),
        ({"speling": 1}, "no option 'speling'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"max_num_seqs": "8"}, "max_num_seqs is '8'. It must be a whole number"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization is '0.9'. It must be a number"),
        ({"max_model_len": "1k"}, "max_model_len is '1k'. It must be a whole number"),
        ({"tensor_parallel_size": 2.0}, "tensor_parallel_size is 2.0. It must be a whole number"),
        ({"kv_cache_memory_bytes": 2**26}, "kv_cache_memory_bytes is 67108864. Give .* both"),
        ({"max_model_len": 5000}, "max_model_len is 5000. The base .* takes 1 to 1024 tokens"),
    ],
)
def test_options_that_cannot_be_honoured(option: dict, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Pair.vllm(**option)


def test_different_vocabularies(tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    tokenizer["model"]["vocab"] = {word: vocabulary[words[-1 - n]] for n, word in enumerate(words)}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(PairMismatch, match="disagree"):
        Pair.vllm(BASE, tmp_path / "other")


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight_", "rotary_emb.inv_freq"])
def test_a_part_of_a_fused_weight_is_not_left_out(tmp_path: Path, name: str) -> None:
    """vLLM takes a fused weight for loaded when one of its parts is, and skips some names."""
    folder = shutil.copytree(BASE, tmp_path / "model")
    header, data = read_header(folder / "model.safetensors")
    header[f"model.layers.0.{name}"] = header.pop("model.layers.0.self_attn.k_proj.weight")
    write_header(folder / "model.safetensors", header, data)
    with pytest.raises(ModelUnavailable, match=r"lack model\.layers\.0\.self_attn\.k_proj\.weight"):
        Pair.vllm(folder, TEACHER)


def test_a_second_file_of_weights_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(BASE, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(ModelUnavailable, match=r"adapter_model\.safetensors beside"):
        Pair.vllm(folder, TEACHER)


def test_models_that_do_not_fit_say_what_they_need() -> None:
    need = Need.of(Checkpoint.open(TEACHER), torch.bfloat16, max_num_seqs=256, drafts=0)
    larger = replace(need, name="large", weights=28 * GIB)
    room = {"utilization": 0.9, "context": 2048, "total": 80 * GIB, "free": 79 * GIB, "given": None}
    fits = split(need, larger, **room)
    spare = 0.9 * 80 * GIB - need.weights - larger.weights - need.forward - larger.forward
    assert fits.base_cache == pytest.approx(
        spare / 2, rel=1e-6
    )  # the same cache per token on both sides
    assert fits.base_share + fits.teacher_share == pytest.approx(0.9, rel=1e-6)
    with pytest.raises(
        DoesNotFit, match=r"large needs 7\d\.\d GiB without its cache.*79\.0 GiB of 80\.0 are free"
    ):
        split(need, replace(larger, weights=70 * GIB), **room)
    with pytest.raises(DoesNotFit, match="caches for 2048 tokens"):
        split(need, larger, **{**room, "given": (GIB, 60 * GIB)})


def test_prompts_beyond_the_context(crowded: Pair) -> None:
    with pytest.raises(PromptTooLong, match=str(CONTEXT)):
        crowded.generate([[300] * CONTEXT])
    (one,) = crowded.generate([[300] * (CONTEXT - 1)], SamplingParams(max_tokens=5))
    assert (one.finish_reason, len(one.token_ids)) == ("length", 1)


def test_one_pair_per_process(crowded: Pair) -> None:
    with pytest.raises(InvalidRequest, match="open in this process already"):
        open_pair()


def test_an_engine_that_dies_returns_the_tokens_so_far(
    crowded: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of the module: the pair is of no use after it."""
    executed = 0
    execute = Core.execute

    def failing(
        core: Core, step: ScheduledStep, device_tokens: DeviceTokens | None = None
    ) -> ExecutedStep:
        nonlocal executed
        executed += 1
        if executed > 24:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return execute(core, step, device_tokens)

    monkeypatch.setattr(Core, "execute", failing)
    prompts = [QUESTIONS[0], " ".join(["river"] * 200)]
    found = crowded.generate(prompts * 4, SamplingParams(max_tokens=30, seed=1, ignore_eos=True))
    assert [c.finish_reason for c in found] == ["error"] * 8
    assert all("illegal memory access" in c.error for c in found)
    assert {c.error_type for c in found} == {"engine"}
    assert len(found[0].token_ids) > 5 and found[0].text
    with pytest.raises(EngineFailure, match="illegal memory access"):
        crowded.generate(QUESTIONS[:1])
