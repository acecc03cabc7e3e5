"""The server answers the calls of prime-rl, slime and AReaL, in the form in which their clients send them.

Bodies and what is read of the answers are those of prime-rl 0.8.0 (with renderers 0.1.12), slime 0.3.1 and AReaL 1.0.4.
Their own code runs in tests/clients.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from midlogit import Pair, SamplingParams
from midlogit.models.checkpoint import bundled
from midlogit.server import call
from tests.server.conftest import Live
from tests.server.test_training import changed, load, post

PROMPT = [5, 300, 7, 42]


def checkpoint(root: Path, step: int) -> Path:
    """A folder of the weights after a step of training, in two files, as trainers save models."""
    folder = root / f"step_{step}"
    folder.mkdir(exist_ok=True)
    weights = changed(step)
    names = sorted(weights)
    for number, some in enumerate((names[:5], names[5:]), start=1):
        file = folder / f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, file)
    (folder / "STABLE").touch()
    return folder


def checksum(live: Live) -> int:
    told = post(live, "/weight_checker", {"action": "checksum"})["checksums"]["base"]
    return int(told)


def sum_of(step: int) -> int:
    weights = changed(step).values()
    return sum(int(weight.view(torch.int32).sum(dtype=torch.int64)) for weight in weights)


def in_background(live: Live, path: str, body: Any) -> tuple[threading.Thread, list[Any]]:
    """A request that is under way when this returns, and where its answer will be."""
    found: list[Any] = []

    def run() -> None:
        with httpx.Client(base_url=live.url, timeout=None) as http:
            found.append(http.post(path, json=body).json())

    thread = threading.Thread(target=run)
    thread.start()
    while not live.rows:
        time.sleep(0.01)
    return thread, found


def of_prime_rl(live: Live, **sampling: Any) -> dict[str, Any]:
    """The body that prime-rl's rollouts send, with extra_body in the sampling parameters."""
    extra_body = {"top_k": -1, "min_p": 0.0, "return_token_ids": True, "cache_salt": "3"}
    return {
        "model": live.pair.mixing.base.name,
        "token_ids": PROMPT,
        "sampling_params": {
            **extra_body,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 12,
            "routed_experts_prompt_start": 3,
            "stop_token_ids": [1],
            "logprobs": 1,
            "skip_special_tokens": False,
            **sampling,
        },
    }


def log_q(choice: dict[str, Any], step: int, params: SamplingParams) -> list[float]:
    """What log q of a choice should be, after a step of training."""
    model = load(bundled("base"))
    model.load_state_dict(changed(step), strict=False)
    with Pair.local(model, bundled("teacher"), dtype="float32", device="cpu") as pair:
        (scores,) = pair.score([PROMPT + choice["token_ids"]], params)
    return scores.diagnostics.logprobs[-len(choice["token_ids"]) :]


def test_prime_rl_finds_its_policy(live: Live) -> None:
    """`wait_for_ready` compares the names of models; `renderers` reads max_model_len."""
    name = live.pair.mixing.base.name
    cards = live.http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["midlogit", name]
    assert {card["max_model_len"] for card in cards} == {live.service.max_model_len}
    teacher = live.http.get("/teacher/v1/models").json()["data"]
    assert [card["id"] for card in teacher] == ["teacher", live.pair.mixing.teacher.name]
    refused = live.post("/inference/v1/generate", {"model": "another", "token_ids": PROMPT})
    assert refused.status_code == 404


def test_prime_rl_samples_and_updates(live: Live, root: Path) -> None:
    """Its update under way: pause, update_weights, resume; the request that runs goes on with the new weights."""
    long = of_prime_rl(live, max_tokens=120, ignore_eos=True)
    thread, answers = in_background(live, "/inference/v1/generate", long)
    post(live, "/pause?mode=keep&clear_cache=false")
    post(live, "/update_weights", {"weight_dir": checkpoint(root, 1).as_posix()})
    post(live, "/resume")
    thread.join(300)
    assert checksum(live) == sum_of(1)
    spans = answers[0]["choices"][0]["weight_versions"]
    assert spans == [{"version": 1, "start": spans[0]["start"], "end": 120}] and spans[0]["start"]

    body = of_prime_rl(live)
    answer = post(live, "/inference/v1/generate", body)
    (choice,) = answer["choices"]
    assert answer["request_id"] and answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert [entry["token_id"] for entry in content] == choice["token_ids"]
    assert choice["finish_reason"] in ("stop", "length") and "sampling_mask" not in choice
    wanted = log_q(choice, 1, SamplingParams.preset("rollout", max_tokens=12))
    assert [entry["logprob"] for entry in content] == pytest.approx(wanted, abs=1e-4)
    (span,) = choice["weight_versions"]
    assert (span["start"], span["end"]) == (0, len(choice["token_ids"]))


def test_without_max_tokens_the_context_is_filled(live: Live) -> None:
    body = of_prime_rl(live, ignore_eos=True)
    body["token_ids"] = [7] * (live.service.max_model_len - 20)
    del body["sampling_params"]["max_tokens"]
    (choice,) = post(live, "/inference/v1/generate", body)["choices"]
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (20, "length")


def test_kept_ids_of_a_nucleus(live: Live) -> None:
    """prime-rl and slime renormalise the policy over them; streams have them, too."""
    options = {"alpha_rule": "equal-kl", "target_top_p": 0.8}
    body = of_prime_rl(live, midlogit=options, seed=4)
    (choice,) = post(live, "/inference/v1/generate", body)["choices"]
    assert len(choice["sampling_mask"]) == len(choice["token_ids"])
    assert all(
        i in kept for i, kept in zip(choice["token_ids"], choice["sampling_mask"], strict=True)
    )
    assert {len(kept) for kept in choice["sampling_mask"]} != {live.pair.mixing.base.logit_size}

    pieces = [chunk["choices"][0] for chunk in live.stream("/inference/v1/generate", body)]
    for name in ("token_ids", "sampling_mask"):
        assert [one for piece in pieces for one in piece.get(name, ())] == choice[name]
    assert pieces[-1]["finish_reason"] == choice["finish_reason"]


def test_kept_ids_are_bounded(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion ends with the mask that fills its share, and has all masks up to there."""
    monkeypatch.setattr(call, "MOST_SUPPORT", 80)
    options = {"alpha_rule": "equal-kl", "target_top_p": 0.8}
    body = of_prime_rl(live, midlogit=options, seed=4, n=2, max_tokens=200, ignore_eos=True)
    choices = post(live, "/inference/v1/generate", body)["choices"]
    streamed = live.stream("/inference/v1/generate", body)
    for choice in choices:
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "support")
        assert len(choice["sampling_mask"]) == len(choice["token_ids"]) < 200
        *before, last = map(len, choice["sampling_mask"])
        assert sum(before) < 40 <= sum(before) + last

        pieces = [p for chunk in streamed for p in chunk["choices"]]
        pieces = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert [i for piece in pieces for i in piece["token_ids"]] == choice["token_ids"]
        assert pieces[-1]["stop_reason"] == "support"


@pytest.mark.parametrize("side", ["base", "teacher"])
def test_prime_rl_scores_with_a_model_alone(live: Live, side: str) -> None:
    """It takes the first entry of each position for the token's own score."""
    ids = [5, 300, 7, 42, 1, 9, 0, 77]
    sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}
    body = {"model": side, "token_ids": ids, "sampling_params": sampling}
    first, *rest = post(live, f"/{side}/inference/v1/generate", body)["prompt_logprobs"]
    assert first is None

    model = load(bundled(side))
    if side == "base":
        model.load_state_dict(changed(1), strict=False)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for k, position in enumerate(rest):
        score = next(iter(position.values()))["logprob"]
        assert score == pytest.approx(float(logprobs[k, ids[k + 1]]), abs=1e-4)


def test_what_cannot_be_honoured_is_refused(live: Live) -> None:
    for changes in (
        {"sampling_params": {"top_p": 0.9}},
        {"sampling_params": {"top_k": 50}},
        {"sampling_params": {"no_such_option": 1}},
        {"features": {"mm_hashes": {"image": ["a"]}}},
        {"output_mode": "text"},
    ):
        refused = live.post("/inference/v1/generate", {"token_ids": PROMPT, **changes})
        assert refused.status_code == 400, refused.text
    mixed = {"token_ids": PROMPT, "sampling_params": {"midlogit": {"alpha_rule": "equal-kl"}}}
    assert live.post("/base/inference/v1/generate", mixed).status_code == 400


def test_slime_updates_from_disk(live: Live, root: Path) -> None:
    """The calls of its `SGLangEngine`, in the order of a full update from disk."""
    info = live.http.get("/server_info").json()
    assert (info["tp_size"], info["pp_size"], info["enable_memory_saver"]) == (1, 1, False)

    thread, answers = in_background(
        live, "/inference/v1/generate", of_prime_rl(live, max_tokens=400, ignore_eos=True)
    )
    post(live, "/pause_generation", {})
    thread.join(300)
    assert answers[0]["choices"][0]["finish_reason"] == "abort"
    assert live.http.get("/flush_cache").status_code == 200
    folder = checkpoint(root, 2)
    update = {"model_path": str(folder), "weight_version": "2"}
    assert post(live, "/update_weights_from_disk", update)["success"]
    assert live.http.get("/get_weight_version").json()["weight_version"] == "2"
    for file in folder.iterdir():  # slime removes the folder now
        file.unlink()
    post(live, "/continue_generation", {})

    assert checksum(live) == sum_of(2)
    (choice,) = post(live, "/inference/v1/generate", of_prime_rl(live))["choices"]
    assert [span["version"] for span in choice["weight_versions"]] == ["2"]


def test_slime_aborts_what_runs(live: Live) -> None:
    """At the end of a rollout with more samples than it needs."""
    thread, answers = in_background(
        live, "/inference/v1/generate", of_prime_rl(live, max_tokens=400, ignore_eos=True)
    )
    (load,) = live.http.get("/v1/loads?include=core").json()["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (1, 0)
    post(live, "/abort_request", {"abort_all": True})
    thread.join(300)
    assert answers[0]["choices"][0]["finish_reason"] == "abort"
    (load,) = live.http.get("/v1/loads?include=core").json()["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 0)


def of_areal(max_tokens: int) -> dict[str, Any]:
    """The body of AReaL's `VLLMBackend`, with the defaults of its GenerationHyperparameters."""
    return {
        "top_p": 1.0,
        "top_k": 10**8,
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "stop_token_ids": [0, 1],
        "ignore_eos": False,
        "skip_special_tokens": True,
        "return_tokens_as_token_ids": True,
        "logprobs": 0,
        "use_beam_search": False,
        "stream": False,
        "prompt": PROMPT,
    }


def test_areal_samples_and_updates(live: Live, root: Path) -> None:
    """An update aborts what runs; the client asks again for the rest, with the ids that it has."""
    long = of_areal(400) | {"ignore_eos": True, "stop_token_ids": []}
    thread, answers = in_background(live, "/v1/completions", long)
    post(live, "/areal_pause_generation", {})
    thread.join(300)
    (choice,) = answers[0]["choices"]
    assert choice["finish_reason"] == "abort"
    ids = [int(token.split(":")[1]) for token in choice["logprobs"]["tokens"]]
    assert len(ids) == len(choice["logprobs"]["token_logprobs"]) < 400

    assert post(live, "/areal_update_weights", {"model_path": str(checkpoint(root, 3))})["success"]
    post(live, "/areal_continue_generation", {})
    assert checksum(live) == sum_of(3)

    body = of_areal(8) | {"prompt": PROMPT + ids}
    (choice,) = live.complete(**body)["choices"]
    assert choice["finish_reason"] in ("stop", "length") and choice["logprobs"]["tokens"]
