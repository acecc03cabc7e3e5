"""A server for trainers over real HTTP: new weights of the base, its prompts, and each model alone."""

from __future__ import annotations

import contextlib
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from safetensors.torch import save_file

from midlogit import Pair, SamplingParams
from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import bundled
from midlogit.server.control import ROUTES
from midlogit.server.settings import ServerSettings
from tests.server.conftest import Live, bundled_pair, events, run_server

Weights = dict[str, torch.Tensor]
PROMPT = "Once upon a time"


def changed(step: int) -> Weights:
    """The base's parameters after a step of training, under the names that a trainer sends; 0 is before the first."""
    model = load(bundled("base"))
    generator = torch.Generator().manual_seed(step)
    return {
        name: value.data + 0.02 * bool(step) * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
    }


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def post(live: Live, path: str, body: Any = None) -> dict[str, Any]:
    response = live.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def update(live: Live, path: str, version: Any = None) -> httpx.Response:
    """An update of one part; the first answer that refuses it, or that of its end."""
    post(live, "/start_weight_update", {})
    response = live.post("/update_weights", {"update_info": {"path": path}})
    if response.status_code != 200:
        return response
    return live.post("/finish_weight_update", {"weight_version": version})


def drawn(live: Live, **fields: Any) -> list[dict[str, Any]]:
    body = {"n": 3, "max_tokens": 12, "logprobs": 0, "return_token_ids": True, **fields}
    return live.complete(PROMPT, **body)["choices"]


def largest_error(weights: Weights, choices: list[dict[str, Any]]) -> float:
    """The largest difference of the served log-probabilities from log q under these weights."""
    model = load(bundled("base"))
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unknown
    params = SamplingParams.preset("rollout", max_tokens=12)
    with Pair.local(model, bundled("teacher"), dtype="float32", device="cpu") as pair:
        texts = [choice["prompt_token_ids"] + choice["token_ids"] for choice in choices]
        scored = pair.score(texts, params)
    return max(
        abs(served - wanted)
        for choice, scores in zip(choices, scored, strict=True)
        for served, wanted in zip(
            choice["logprobs"]["token_logprobs"],
            scores.diagnostics.logprobs[-len(choice["token_ids"]) :],
            strict=True,
        )
    )


def test_without_the_option_there_are_no_routes(server: Live) -> None:
    for route in ROUTES:
        (method,) = (route.methods or set()) - {"HEAD"}
        assert server.http.request(method, route.path).status_code == 404
    assert server.http.get("/teacher/v1/models").status_code == 404


def test_what_clients_ask_of_a_server(live: Live) -> None:
    info = live.http.get("/server_info", params={"config_format": "json"}).json()["vllm_config"]
    assert info["weight_transfer_config"] == {"backend": "disk"}
    assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert live.http.get("/get_world_size").json() == {"world_size": 1}
    assert post(live, "/reset_prefix_cache") == {"success": True}


def test_each_update_is_seen_in_the_log_probabilities(live: Live, root: Path) -> None:
    for step in (1, 2, 3):
        weights = changed(step)
        save_file(weights, root / "step.safetensors")
        assert update(live, "step.safetensors", f"step-{step}").status_code == 200

        choices = drawn(live)
        assert largest_error(weights, choices) < 1e-4 < largest_error(changed(0), choices)
        for choice in choices:
            span = {"version": f"step-{step}", "start": 0, "end": len(choice["token_ids"])}
            assert choice["weight_versions"] == [span]
        assert live.http.get("/weight_info").json() == {"weight_version": f"step-{step}"}


def test_parts_folders_and_single_calls(live: Live, root: Path) -> None:
    weights = changed(4)
    names = sorted(weights)
    folder = root / "parts"
    folder.mkdir()
    save_file({n: weights[n] for n in names[::2]}, folder / "one.safetensors")
    save_file({n: weights[n] for n in names[1::2]}, folder / "two.safetensors")

    post(live, "/start_weight_update")
    for part in ("one", "two"):
        post(live, "/update_weights", {"update_info": {"path": f"parts/{part}.safetensors"}})
    post(live, "/finish_weight_update")
    assert largest_error(weights, drawn(live)) < 1e-4

    save_file(changed(5), root / "step.safetensors")
    assert post(live, "/update_weights", {"weight_dir": str(root / "step.safetensors")})
    assert largest_error(changed(5), drawn(live)) < 1e-4
    body = {"model_path": str(folder), "weight_version": "7"}
    assert post(live, "/update_weights_from_disk", body)["success"]
    assert drawn(live)[0]["weight_versions"][0]["version"] == "7"
    assert largest_error(weights, drawn(live)) < 1e-4


def damaged(root: Path) -> dict[str, str]:
    """Weights that must be refused, with the code of the error."""
    whole = changed(9)
    first, *_ = sorted(whole)
    cases: dict[str, Weights] = {
        "missing": {n: w for n, w in whole.items() if n != first},
        "unknown": {**whole, "model.unknown.weight": torch.zeros(2)},
        "shape": {**whole, first: torch.zeros(3, 3)},
        "nan": {**whole, first: torch.full_like(whole[first], float("nan"))},
    }
    for name, weights in cases.items():
        save_file(weights, root / f"{name}.safetensors")

    save_file(whole, root / "whole.safetensors")
    data = (root / "whole.safetensors").read_bytes()
    (root / "torn.safetensors").write_bytes(data[: len(data) // 2])
    (root / "pickle.bin").write_bytes(b"\x80\x04.")
    outside = root.parent / "outside.safetensors"
    outside.write_bytes(data)
    (root / "link.safetensors").symlink_to(outside)
    (root / "circle").symlink_to(root / "circle")
    return {
        **{f"{name}.safetensors": "weight_mismatch" for name in cases},
        "torn.safetensors": "torn_weights",
        "pickle.bin": "no_safetensors",
        "../outside.safetensors": "outside_root",
        str(outside): "outside_root",
        "link.safetensors": "outside_root",
        "circle": "outside_root",
        "nul\0": "outside_root",
        "nothing.safetensors": "no_weights",
        "/etc": "outside_root",
    }


def test_bad_weights_change_nothing_and_stop_nobody(live: Live, root: Path) -> None:
    before = drawn(live, temperature=0)
    for path, code in damaged(root).items():
        response = update(live, path)
        assert 400 <= response.status_code < 500, (path, response.text)
        assert response.json()["error"]["code"] == code, path
    assert live.post("/finish_weight_update").status_code == 400  # nothing came
    assert live.post("/finish_weight_update").status_code == 409
    assert [c["token_ids"] for c in drawn(live, temperature=0)] == [c["token_ids"] for c in before]
    assert live.post("/update_weights", {"update_info": 3}).status_code == 422
    assert live.post("/update_weights", {}).status_code == 422


def test_running_requests_go_on_through_updates(live: Live, root: Path) -> None:
    save_file(changed(6), root / "good.safetensors")
    save_file({"no.such.weight": torch.zeros(1)}, root / "bad.safetensors")
    body = {"prompt": PROMPT, "max_tokens": 200, "stream": True, "return_token_ids": True}
    body["ignore_eos"] = True
    with live.http.stream("POST", "/v1/completions", json=body) as response:
        found = events(response.iter_lines())
        next(found)
        assert update(live, "bad.safetensors").status_code == 400
        assert update(live, "good.safetensors", "good").status_code == 200
        *_, last = found
    (choice,) = last["choices"]
    assert choice["finish_reason"] == "length"
    spans = choice["weight_versions"]
    assert spans[-1]["version"] == "good" and spans[-1]["end"] == 200
    assert all(one["end"] == two["start"] for one, two in pairwise(spans))


def test_a_trainer_that_dies_leaves_nothing_behind(live: Live, root: Path) -> None:
    post(live, "/init_weight_transfer_engine", {"init_info": {"master_port": 51216}})
    post(live, "/start_weight_update", {})
    announced = {"update_info": {"names": sorted(changed(7)), "packed": True}}
    with contextlib.suppress(httpx.ReadTimeout):  # the trainer dies before it has written its file
        live.http.post("/update_weights", json=announced, timeout=0.3)
    assert drawn(live)

    save_file(changed(8), root / "good.safetensors")
    assert update(live, "good.safetensors").status_code == 200
    assert largest_error(changed(8), drawn(live)) < 1e-4


def test_a_file_under_the_port_of_a_trainer_that_names_none(live: Live, root: Path) -> None:
    weights = changed(7)
    post(live, "/init_weight_transfer_engine", {"init_info": {"master_port": 51216}})
    post(live, "/start_weight_update", {})

    def write() -> None:
        time.sleep(0.1)
        save_file(weights, root / "51216.part")
        (root / "51216.part").rename(root / "51216.safetensors")

    writer = threading.Thread(target=write)
    writer.start()
    post(live, "/update_weights", {"update_info": {"names": list(weights), "packed": True}})
    writer.join()
    post(live, "/finish_weight_update", {})
    assert largest_error(weights, drawn(live)) < 1e-4
    assert not (root / "51216.safetensors").exists()


def test_both_sides_see_the_same_weights(live: Live, root: Path) -> None:
    weights = changed(2)
    save_file(weights, root / "good.safetensors")
    assert update(live, "good.safetensors").status_code == 200
    told = post(live, "/weight_checker", {"action": "checksum"})["checksums"]["base"]
    assert int(told) == sum(
        int(weight.view(torch.int32).sum(dtype=torch.int64)) for weight in weights.values()
    )


def test_pauses(live: Live) -> None:
    post(live, "/pause?mode=keep")
    assert live.http.get("/is_paused").json() == {"is_paused": True}
    with httpx.Client(base_url=live.url) as other, pytest.raises(httpx.ReadTimeout):
        other.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, timeout=0.3)
    post(live, "/resume")
    assert live.http.get("/is_paused").json() == {"is_paused": False}
    assert drawn(live)

    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    for call in ("/pause", "/abort_requests"):
        with live.http.stream("POST", "/v1/completions", json=body) as response:
            found = events(response.iter_lines())
            next(found)
            post(live, call)
            *_, last = found
        assert last["choices"][0]["finish_reason"] == "abort"
        if call == "/pause":
            post(live, "/resume")
    assert drawn(live)
    assert live.post("/pause?mode=sleep").status_code == 400


def test_a_batch_larger_than_any_queue(live: Live) -> None:
    prompts = [[5 + k, 6, 7] for k in range(100)]
    answer = live.complete(prompts, n=4, max_tokens=1)
    assert len(answer["choices"]) == 400


def test_prompts_are_those_of_the_base(live: Live) -> None:
    mixing = live.pair.mixing
    mine, theirs = [[5, 6, 7], [8, 9]], [[{"role": "user", "content": "Hi"}], "Once"]
    ids = [mixing.teacher.encode_chat(theirs[0], {}), mixing.teacher.encode(theirs[1])]
    fields = {"max_tokens": 1, "return_token_ids": True}

    def read(teacher_prompt: Any) -> list[tuple[list[int], list[int]]]:
        options = {"teacher_prompt": teacher_prompt, "diagnostics": True}
        choices = live.complete(mine, midlogit=options, **fields)["choices"]
        return [(c["prompt_token_ids"], c["midlogit"]["teacher_prompt_token_ids"]) for c in choices]

    assert read(theirs) == [(mine[0], ids[0]), (mine[1], ids[1])]
    assert read([[4, 5], [6]]) == [(mine[0], [4, 5]), (mine[1], [6])]
    assert read([4, 5]) == [(mine[0], [4, 5]), (mine[1], [4, 5])]
    assert read(theirs[0]) == [(mine[0], ids[0]), (mine[1], ids[0])]
    assert read(None) == [(mine[0], mine[0]), (mine[1], mine[1])]

    refused = live.post("/v1/completions", {"prompt": mine, "midlogit": {"teacher_prompt": ["a"]}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "midlogit.teacher_prompt"

    chat = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    rendered = mixing.base.encode_chat(chat["messages"], {})
    assert post(live, "/v1/chat/completions", chat)["prompt_token_ids"] == rendered


def test_completions_end_with_an_id_of_the_base(live: Live, root: Path) -> None:
    mixing = live.pair.mixing
    save_file(changed(0), root / "trained.safetensors")
    assert update(live, "trained.safetensors").status_code == 200

    def last_ids(**fields: Any) -> set[int]:
        body = {"n": 16, "max_tokens": 60, "seed": 1, "return_token_ids": True, **fields}
        answer = live.complete("Question: What do cats like?\nAnswer:", **body)
        return {c["token_ids"][-1] for c in answer["choices"] if c["finish_reason"] == "stop"}

    for options in ({}, {"preset": "exploratory"}):
        own = last_ids(midlogit=options)
        assert own and own <= set(mixing.base.stop_ids)
    theirs = last_ids(midlogit={"stop_id": "teacher"})
    assert theirs and theirs <= set(mixing.teacher.stop_ids)


def test_prompt_logprobs_of_the_mixture(live: Live) -> None:
    texts = ["Once upon a time there was a fox.", "Hi there"]
    body = {"max_tokens": 1, "prompt_logprobs": 3, "return_token_ids": True, "temperature": 0.7}
    params = SamplingParams.preset("rollout", max_tokens=1, temperature=0.7, top_logprobs=3)
    scored = live.pair.score(texts, params)
    for choice, scores in zip(live.complete(texts, **body)["choices"], scored, strict=True):
        first, *positions = choice["prompt_logprobs"]
        assert first is None and len(positions) == len(choice["prompt_token_ids"]) - 1
        for k, position in enumerate(positions):
            own = position[str(scores.token_ids[k + 1])]
            assert own["logprob"] == pytest.approx(scores.diagnostics.logprobs[k], abs=1e-4)
            ranked = sorted(position.items(), key=lambda item: item[1]["rank"])
            assert scores.top is not None
            assert [int(i) for i, _ in ranked[:3]] == [i for i, _ in scores.top[k].q]

    streamed = live.post("/v1/completions", {"prompt": "Hi", "stream": True, "prompt_logprobs": 0})
    assert streamed.status_code == 422


@pytest.mark.parametrize("side", ["base", "teacher"])
def test_each_model_alone(side: str, root: Path) -> None:
    """Over its whole vocabulary at the temperature that is asked for, as a plain model says."""
    ids = [[5, 300, 7, 42, 1, 9, 0, 77], [11, 12, 2, 3]]
    with run_server(bundled_pair, train=True, preset="rollout") as live:
        assert live.http.get(f"/{side}/health").status_code == 200
        assert live.http.get(f"/{side}/v1/models").json()["data"][0]["id"] == side
        body = {"model": side, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 5}
        answer = post(live, f"/{side}/v1/completions", {**body, "temperature": 0.5})
        options = {**body, "midlogit": {"alpha_rule": "equal-kl"}}
        assert live.post(f"/{side}/v1/completions", options).status_code == 400
        assert live.post(f"/{side}/v1/completions", {**body, "model": "x"}).status_code == 404
        assert live.http.get("/server_info").json()["vllm_config"]["weight_transfer_config"] is None
        refused = live.post("/start_weight_update", {})
        assert refused.status_code == 400 and "--weights-root" in refused.text

    assert answer["model"] == side
    model = load(bundled(side))
    for row, choice in zip(ids, answer["choices"], strict=True):
        with torch.inference_mode():
            logprobs = (model(torch.tensor([row])).logits[0] / 0.5).log_softmax(-1)
        for k, position in enumerate(choice["prompt_logprobs"][1:]):
            assert str(row[k + 1]) in position and len(position) >= 5
            for token_id, entry in position.items():
                assert entry["logprob"] == pytest.approx(
                    float(logprobs[k, int(token_id)]), abs=1e-4
                )


def test_who_may_change_weights(root: Path) -> None:
    with pytest.raises(InvalidRequest, match="api-key"):
        ServerSettings(host="0.0.0.0", train=True, weights_root=root)
    with pytest.raises(InvalidRequest, match="--train"):
        ServerSettings(weights_root=root)
    with pytest.raises(InvalidRequest, match="not a folder"):
        ServerSettings(train=True, weights_root=root / "nothing")

    settings: dict[str, Any] = {"train": True, "weights_root": root, "api_keys": ("a-key",)}
    with run_server(bundled_pair, host="0.0.0.0", **settings) as live:
        assert live.post("/start_weight_update", {}).status_code == 401
        wrong = live.url.replace("http://", "http://any:no-key@")
        assert httpx.post(f"{wrong}/start_weight_update", json={}).status_code == 401
        keyed = live.url.replace("http://", "http://any:a-key@")
        assert httpx.post(f"{keyed}/start_weight_update", json={}).status_code == 200
        page = {"Authorization": "Bearer a-key", "Origin": "http://elsewhere"}
        assert live.post("/pause", headers=page).status_code == 403
        assert live.http.get("/teacher/health").status_code == 200
