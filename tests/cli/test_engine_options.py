"""vLLM's options on the command line, as far as no vLLM is needed; and which engine auto is."""

from __future__ import annotations

import logging

import pytest
import torch
from typer.testing import CliRunner

from midlogit import InvalidRequest
from midlogit.cli.loading import InProcess, PairOptions, parse_engine_args, source_of
from midlogit.cli.main import app
from midlogit.engines.vllm import options

URL = "http://127.0.0.1:9/v1"


def test_values_are_json_or_text() -> None:
    common = {"quantization": "fp8", "revision": None}
    both = ["max_num_batched_tokens=4096", "load_format=dummy", 'compilation_config={"mode": 0}']
    found = parse_engine_args(common, both, ["revision=a=b"], ["enforce_eager=true", "seed="])
    assert found == {
        "quantization": "fp8",
        "max_num_batched_tokens": 4096,
        "load_format": "dummy",
        "compilation_config": {"mode": 0},
        "base_args": {"revision": "a=b"},
        "teacher_args": {"enforce_eager": True, "seed": ""},
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--engine-arg", "quantization"], "--engine-arg is 'quantization'"),
        (["--teacher-arg", "=fp8"], "--teacher-arg is '=fp8'"),
        (["--quantization", "fp8", "--engine-arg", "quantization=awq"], "quantization is given tw"),
        (["--base-arg", "seed=1", "--base-arg", "seed=2"], "seed is given twice by --base-arg"),
        (["--engine-arg", "max_num_seqs=4"], "--engine-arg cannot set max_num_seqs"),
        (["--engine-arg", "teacher=x"], "--engine-arg cannot set teacher"),
        (["--engine", "local", "--base-arg", "seed=1"], "--base-arg is an option of vLLM in this"),
        (["--base-lora", "x"], "--base-lora is an option of vLLM in this process, and the engine"),
        (["--no-enable-prefix-caching"], "enable_prefix_caching is an option of vLLM in this"),
    ],
)
@pytest.mark.parametrize(
    "command", [["generate", "Hi"], ["serve"], ["batch", "plan", "rows.txt", "--out", "run"]]
)
def test_what_cannot_be_used_is_one_line(
    command: list[str], given: list[str], says: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("Hi\n")
    error = CliRunner().invoke(app, [*command, *given]).exception
    assert isinstance(error, InvalidRequest)
    assert str(error).startswith(says) and "\n" not in str(error)
    assert not (tmp_path / "run").exists()
    assert not logging.getLogger("midlogit.server").handlers  # the server had not begun


def test_servers_take_no_options_of_vllm_in_this_process() -> None:
    here = InProcess(engine_args={"teacher_args": {"quantization": "fp8"}})
    with pytest.raises(InvalidRequest, match=r"--teacher-arg is .* two servers are named"):
        source_of(PairOptions(URL, URL, in_process=here))
    here = InProcess(engine_args={"base_lora": "adapter"})
    with pytest.raises(InvalidRequest, match=r"--lora-modules.*give its name as --base-model"):
        source_of(PairOptions(URL, URL, in_process=here))


@pytest.mark.parametrize(
    ("version", "has_gpu", "device", "engine", "slots"),
    [
        ("0.32.0", True, "auto", "vllm", 256),
        ("0.32.0", True, "cuda:1", "local", 16),
        ("0.32.0", False, "auto", "local", 16),
        ("99.0.0", True, "auto", "local", 16),
        (None, True, "auto", "local", 16),
    ],
)
def test_auto_is_vllm_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    has_gpu: bool,
    device: str,
    engine: str,
    slots: int,
) -> None:
    def installed(name: str) -> str:
        assert name == "vllm"
        if version is None:
            raise options.PackageNotFoundError
        return version

    monkeypatch.setattr(options, "installed_version", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    pair = PairOptions(in_process=InProcess(device=device))
    assert (source_of(pair).engine, pair.slots) == (engine, slots)


def test_doctor_says_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "installed_version", lambda name: "0.32.0")
    for has_gpu, says in ((True, "vllm"), (False, "local: there is no GPU")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert f"\nengine     auto takes {says}\n" in CliRunner().invoke(app, ["doctor"]).output


def test_a_jobs_facts_hold_what_tokens_depend_on() -> None:
    """Speed and memory may change between the runs of a job, numbers may not."""
    given = parse_engine_args(
        {"quantization": "fp8", "enforce_eager": True, "max_num_batched_tokens": 512},
        None,
        ["kv_cache_dtype=fp8"],
        ["enable_prefix_caching=false"],
    )
    source = source_of(PairOptions(in_process=InProcess("vllm", engine_args=given)))
    with source.mixing() as mixing:
        assert source.facts(mixing)["engine_args"] == {
            "quantization": "fp8",
            "base.kv_cache_dtype": "fp8",
        }
    plain = source_of(PairOptions(in_process=InProcess("vllm")))
    with plain.mixing() as mixing:
        assert "engine_args" not in plain.facts(mixing)  # jobs that began without them go on
