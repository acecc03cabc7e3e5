"""`serve --train` over vLLM: the base's own transfer, by the calls of TRL's client; NCCL is replaced by a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.conftest import TEACHER
from tests.updates import Named, named, trained
from tests.vllm.conftest import open_pair
from tests.vllm.test_transfer import info

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tests.server.conftest import Live, run_server

BODY = {"n": 4, "max_tokens": 12, "return_token_ids": True, "midlogit": {"diagnostics": True}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    from tests.file_transfer import NAME

    options: dict[str, Any] = {"weight_transfer_config": {"backend": NAME}, "max_num_seqs": 8}
    with run_server(lambda: open_pair(**options), train=True, preset="rollout") as opened:
        yield opened


def send(live: Live, weights: Named, file: Path) -> dict[str, Any]:
    """The calls of TRL's client, in their order; the last answer."""
    save_file(weights, file)
    for path, body in (
        ("/init_weight_transfer_engine", {"init_info": {"file": str(file)}}),
        ("/start_weight_update", {}),
        ("/update_weights", {"update_info": info(weights)}),
        ("/finish_weight_update", {}),
        ("/reset_prefix_cache", None),
    ):
        response = live.post(path, body)
        if response.status_code != 200:
            return response.json()
    return response.json()


def largest_error(live: Live, model: Any) -> float:
    """Of the base's log-probabilities in the diagnostics, against a plain model."""
    choices = live.complete("Once upon a time", **BODY)["choices"]
    errors = []
    for choice in choices:
        prompt, ids = choice["prompt_token_ids"], choice["token_ids"]
        with torch.inference_mode():
            rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        wanted = rows.log_softmax(-1)[range(len(ids)), ids]
        found = torch.tensor(choice["midlogit"]["diagnostics"]["base_tempered_logprobs"])
        errors.append(float((found - wanted).abs().max()))
    return max(errors)


def test_weights_come_by_the_engines_own_transfer(live: Live, tmp_path: Path) -> None:
    told = live.http.get("/server_info", params={"config_format": "json"}).json()["vllm_config"]
    assert told["weight_transfer_config"] == {"backend": "file"}
    first = live.post("/weight_checker", {"action": "checksum"}).json()["checksums"]["base"]
    for step in (1, 2, 3):
        model = trained(step, 0.03)
        assert send(live, named(model), tmp_path / "weights") == {"success": True}
        assert largest_error(live, model) < 1e-4
        versions = live.complete("Once", max_tokens=2)["choices"][0]["weight_versions"]
        assert versions == [{"version": step, "start": 0, "end": 2}]
    last = live.post("/weight_checker", {"action": "checksum"}).json()["checksums"]["base"]
    assert first != last


def test_weights_that_do_not_fit_and_trainers_that_die(live: Live, tmp_path: Path) -> None:
    before = trained(4, 0.03)
    assert send(live, named(before), tmp_path / "weights") == {"success": True}

    unknown = {**named(trained(5)), "model.unknown": torch.zeros(2)}
    assert send(live, unknown, tmp_path / "weights")["error"]["code"] == "weight_mismatch"
    assert largest_error(live, before) < 1e-4

    assert live.post("/start_weight_update", {}).status_code == 200  # then its trainer dies
    after = trained(6, 0.03)
    assert send(live, named(after), tmp_path / "weights") == {"success": True}
    assert largest_error(live, after) < 1e-4


def test_the_teacher_alone_scores(live: Live) -> None:
    row = [5, 300, 7, 42, 1, 9]
    body = {"prompt": [row], "max_tokens": 1, "prompt_logprobs": 2, "temperature": 0.8}
    answer = live.post("/teacher/v1/completions", body).json()
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = (model(torch.tensor([row])).logits[0] / 0.8).log_softmax(-1)
    for k, position in enumerate(answer["choices"][0]["prompt_logprobs"][1:]):
        assert str(row[k + 1]) in position
        for token_id, entry in position.items():
            wanted = float(logprobs[k, int(token_id)])
            assert entry["logprob"] == pytest.approx(wanted, abs=1e-3)
