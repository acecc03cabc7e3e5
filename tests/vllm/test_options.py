"""Options of vLLM for both models or one, as keywords and as words on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from midlogit import InvalidRequest, ModelUnavailable, Pair, SamplingParams
from midlogit.cli.main import app
from midlogit.engines.vllm.memory import Need
from midlogit.models.checkpoint import Checkpoint
from tests.conftest import BASE
from tests.questions import QUESTIONS
from tests.vllm.conftest import engine_of, open_pair, require_empty


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"qantization": "fp8"}, "no option 'qantization'. .* such as quantization"),
        ({"base_args": {"kv-cache-dtype": "fp8"}}, "such as kv_cache_dtype"),
        ({"enable_lora": True}, "enable_lora cannot be used here: .* base_lora and teacher_lora"),
        ({"teacher_args": {"async_scheduling": True}}, "async_scheduling cannot be used here"),
        ({"base_args": {"tokenizer": "x"}}, "tokenizer cannot be used here: .* name a folder"),
        ({"base_args": {"dtype": "float16"}}, "dtype is given in base_args, and both .* same"),
        ({"teacher_args": {"max_num_seqs": 4}}, "max_num_seqs is given in teacher_args"),
        ({"teacher_args": {"weight_transfer_config": {}}}, "only the base's weights change"),
        ({"revision": "main"}, "revision is 'main', and the bundled pair is no hub id"),
        ({"quantization": "fp9"}, "refuses options of the base: Unknown quantization .*'fp8'"),
        ({"teacher_args": {"kv_cache_dtype": "fp7"}}, "options of the teacher: .*'auto', .*'fp8'"),
        ({"base_args": {"max_num_batched_tokens": -3}}, "max_num_batched_tokens: .* than or equal"),
        ({"base_args": {"quantization": "fp8"}, "dtype": "float32"}, "float32 is not supported"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_loaded(
    arguments: dict, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        Pair.vllm(**arguments)
    assert "\n" not in str(refused.value)


def test_the_command_line_says_the_same() -> None:
    words = ["generate", "Hi", "--engine", "vllm", "--teacher-arg", "kv_cache_dtype=fp7"]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, InvalidRequest)
    assert str(error).startswith("vLLM refuses options of the teacher: ")


def test_each_side_has_its_own(pair: Pair) -> None:
    """Blocks, chunks and caches differ between the sides, and tokens do not."""
    apart = open_pair(
        enable_prefix_caching=False,
        base_args={"block_size": 64, "enable_prefix_caching": True},
        teacher_args={"max_num_batched_tokens": 48},
        max_num_seqs=16,
        speculation=3,
    )
    prompts = [" ".join(["river"] * 80) + f" {question}" for question in QUESTIONS[:4]]
    asked = SamplingParams(temperature=0, max_tokens=20)
    with apart:
        configs = [core._core.vllm_config for core in engine_of(apart).cores]
        assert [c.cache_config.block_size for c in configs] == [64, 32]
        assert [c.cache_config.enable_prefix_caching for c in configs] == [True, False]
        assert configs[1].scheduler_config.max_num_batched_tokens == 48
        found = apart.generate(prompts, asked)
        require_empty(apart)
    expected = pair.generate(prompts, asked)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_a_revision_is_what_both_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub id; the hub's cache on disk is enough."""
    import huggingface_hub.constants as hub

    repository = tmp_path / "models--some--model"
    for commit in ("1" * 40, "2" * 40):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in BASE.iterdir():
            (snapshot / file.name).symlink_to(file)
    (snapshot / "config.json").unlink()  # of the second: it is found to be no model
    (repository / "refs").mkdir()
    (repository / "refs" / "old").write_text("1" * 40)
    (repository / "refs" / "new").write_text("2" * 40)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)

    with pytest.raises(ModelUnavailable, match=r"2222 holds no config\.json"):
        Pair.vllm("some/model", "some/model", base_args={"revision": "new"}, revision="old")
    with pytest.raises(ModelUnavailable, match="cannot be fetched at the revision 'other'"):
        Pair.vllm("some/model", "some/model", revision="other")
    with pytest.raises(InvalidRequest, match="float32 is not supported"):  # found, and looked at
        Pair.vllm("some/model", "some/model", revision="old", dtype="float32", quantization="fp8")


def test_a_cache_of_8_bits_holds_more_tokens() -> None:
    import torch

    checkpoint = Checkpoint.open(BASE)
    tokens = {
        name: Need.of(checkpoint, torch.bfloat16, 4, 0, name).token
        for name in ("auto", "fp8", "float32")
    }
    assert tokens["auto"] == 2 * tokens["fp8"] == tokens["float32"] // 2
