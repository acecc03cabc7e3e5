"""New weights on a real server of the base, from folders and by transfer: what is drawn then, and refusals."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from midlogit import Completion, InvalidRequest, Pair
from midlogit.engines.http.engine import HttpEngine
from midlogit.errors import EngineFailure, ServerUnavailable, WeightMismatch
from midlogit.requests.prompts import Reading
from tests.conftest import BASE
from tests.http.conftest import WHOLE, Urls
from tests.http.proxy import Proxy
from tests.questions import QUESTIONS
from tests.server.conftest import run_server
from tests.updates import PARAMS, Named, base_logprobs, named, torn, trained

READING = Reading(chat=True)


def untied(seed: int, scale: float = 0.03) -> Any:
    """`trained` with a head of its own."""
    model = trained(seed, scale)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BASE / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def updated(urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Over the servers of all tests: in the end the base has its weights again."""
    with Pair.http(urls.base, urls.teacher, top_k=WHOLE, speculation="off") as opened:
        yield opened
        opened.update_base(saved(untied(0, 0.0), tmp_path_factory.mktemp("first")))


def update_midway(pair: Pair, update: Callable[[], None], count: int = 8) -> list[Completion]:
    """Completions of requests, in whose midst the update is made, after a few tokens of the first."""
    batch = pair.start(pair.prepare(QUESTIONS[:count], PARAMS, READING, stream=True))
    done: list[Completion] = []
    tokens = itertools.count(1)
    error: list[BaseException] = []

    def run() -> None:
        try:
            update()
        except BaseException as raised:
            error.append(raised)

    updater = threading.Thread(target=run)
    while not batch.is_over:
        event = batch.poll(1)
        if isinstance(event, Completion):
            done.append(event)
        elif event is not None and next(tokens) == 3 * count:
            updater.start()
    updater.join()
    if error:
        raise error[0]
    return sorted(done, key=lambda completion: completion.index)


def test_running_requests_go_on_under_new_weights(updated: Pair, tmp_path: Path) -> None:
    old, new = untied(1), untied(2)
    updated.update_base(saved(old, tmp_path / "old"), version="old")
    folder = saved(new, tmp_path / "new")
    done = update_midway(updated, lambda: updated.update_base(folder, version="new"))
    assert any(len(c.weight_versions) == 2 for c in done)
    for completion in done:
        end = completion.weight_versions[0].end
        assert completion.weight_versions[0].version == "old"
        found = completion.diagnostics.base_logprobs
        before = base_logprobs(old, completion, updated)
        after = base_logprobs(new, completion, updated)
        assert found[:end] == pytest.approx(before[:end], abs=1e-3)
        assert found[end:] == pytest.approx(after[end:], abs=1e-3)


def test_servers_that_have_new_weights_already(updated: Pair, tmp_path: Path) -> None:
    """As a trainer's own servers do; here the old ones go on, under another version."""
    updated.update_base(saved(untied(3), tmp_path), version=3)
    done = update_midway(updated, lambda: updated.update_base(version=4))
    for completion in done:
        assert [span.version for span in completion.weight_versions] in ([3, 4], [3])
        assert completion.diagnostics.base_logprobs == pytest.approx(
            base_logprobs(untied(3), completion, updated), abs=1e-3
        )


def test_requests_that_have_begun_may_be_aborted(updated: Pair) -> None:
    done = update_midway(updated, lambda: updated.update_base(running="abort"))
    assert "abort" in {c.finish_reason for c in done}
    assert all(len(c.token_ids) < 16 for c in done if c.finish_reason == "abort")


def test_folders_that_do_not_fit_never_reach_the_server(updated: Pair, tmp_path: Path) -> None:
    version, expected = updated.base_version, updated.generate(QUESTIONS[:2], PARAMS)
    norm = {"model.norm.weight": torch.full((192,), torch.nan)}
    for n, (changes, message) in enumerate(
        [
            ({"model.norm.weight": None}, "missing: model.norm.weight"),
            ({"lm_head.weight": None}, "missing: lm_head.weight"),
            ({"x": torch.ones(1)}, "no weight 'x'"),
            ({"model.norm.weight": torch.ones(3)}, r"the shape \[3\]"),
            (norm, "NaN"),
            ({k: v.to(torch.bfloat16) for k, v in norm.items()}, "NaN"),
        ]
    ):
        folder = tmp_path / str(n)
        folder.mkdir()
        weights: dict[str, Any] = {**named(untied(1)), **changes}
        save_file({k: v for k, v in weights.items() if v is not None}, folder / "a.safetensors")
        with pytest.raises(WeightMismatch, match=message):
            updated.update_base(folder)
    for folder, message in ((torn(tmp_path), "cannot be read"), (Path("/"), "no safetensors")):
        with pytest.raises(WeightMismatch, match=message):
            updated.update_base(folder)
    assert updated.base_version == version
    for one, other in zip(updated.generate(QUESTIONS[:2], PARAMS), expected, strict=True):
        assert one.token_ids == other.token_ids


def test_refusals(updated: Pair, urls: Urls) -> None:
    with pytest.raises(InvalidRequest, match="take no tensors"):
        updated.update_base(named(untied(1)).items())
    with pytest.raises(InvalidRequest, match="cannot keep"):
        updated.update_base(running="keep")
    with Pair.http(urls.teacher, urls.teacher) as plain:
        with pytest.raises(InvalidRequest, match="VLLM_SERVER_DEV_MODE"):
            plain.update_base()
        assert plain.generate(QUESTIONS[:1], PARAMS)[0].finish_reason == "length"


def http_engine(pair: Pair) -> HttpEngine:
    assert isinstance(pair.engine, HttpEngine)
    return pair.engine


def announced(weights: Named) -> dict[str, Any]:
    return {"names": list(weights), "shapes": [list(w.shape) for w in weights.values()]}


def write(weights: Named, file: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)


def send(engine: HttpEngine, weights: Named, file: Path, **finish: Any) -> None:
    """What a trainer does, in two parts."""
    write(weights, file)
    engine.start_weight_update()
    for names in (list(weights)[:9], list(weights)[9:]):
        engine.update_weights(announced({name: weights[name] for name in names}))
    engine.finish_weight_update(**finish)


def test_running_requests_go_on_under_transferred_weights(updated: Pair, tmp_path: Path) -> None:
    engine, old, new, file = http_engine(updated), untied(1), untied(2), tmp_path / "weights"
    assert engine.transfer_backend == "file" and engine.transfer_world_size == 1
    engine.init_weight_transfer_engine({"file": str(file)})
    send(engine, named(old), file, version="old")
    done = update_midway(updated, lambda: send(engine, named(new), file, version="new"))
    assert any(len(c.weight_versions) == 2 for c in done)
    for completion in done:
        end = completion.weight_versions[0].end
        assert completion.weight_versions[0].version == "old"
        found = completion.diagnostics.base_logprobs
        before, after = (base_logprobs(model, completion, updated) for model in (old, new))
        assert found[:end] == pytest.approx(before[:end], abs=1e-3)
        assert found[end:] == pytest.approx(after[end:], abs=1e-3)


def test_transfers_that_do_not_fit(updated: Pair, tmp_path: Path) -> None:
    engine, file = http_engine(updated), tmp_path / "weights"
    engine.init_weight_transfer_engine({"file": str(file)})
    expected = updated.generate(QUESTIONS[:2], PARAMS)
    with pytest.raises(InvalidRequest, match="No update has begun"):
        engine.finish_weight_update()
    for wrong in ({"x": torch.ones(2)}, {"model.norm.weight": torch.ones(3)}):
        with pytest.raises(WeightMismatch, match="old weights stay"):
            send(engine, wrong, file)
    engine.start_weight_update()
    with pytest.raises(WeightMismatch, match="old weights stay"):
        engine.finish_weight_update()
    for one, other in zip(updated.generate(QUESTIONS[:2], PARAMS), expected, strict=True):
        assert one.token_ids == other.token_ids


def test_a_trainer_that_dies_leaves_requests_waiting_for_the_next(
    updated: Pair, tmp_path: Path
) -> None:
    engine, file, new = http_engine(updated), tmp_path / "weights", named(untied(4))
    engine.init_weight_transfer_engine({"file": str(file)})
    with pytest.raises(WeightMismatch, match="Requests wait until an update is complete"):
        send(engine, dict(list(new.items())[:9]), file)
    file.unlink()
    engine.start_weight_update()
    with pytest.raises(ServerUnavailable, match="Requests wait until an update is complete"):
        engine.update_weights(announced(new))

    batch = updated.start(updated.prepare(QUESTIONS[:1], PARAMS, READING))
    assert batch.poll(0.5) is None
    send(engine, new, file)  # another trainer
    (completion,) = batch
    assert isinstance(completion, Completion)
    assert completion.diagnostics.base_logprobs == pytest.approx(
        base_logprobs(untied(4), completion, updated), abs=1e-3
    )

    engine.start_weight_update()
    updated.update_base(saved(untied(3), tmp_path / "folder"))
    (completion,) = updated.generate(QUESTIONS[:1], PARAMS, chat=True)
    assert completion.diagnostics.base_logprobs == pytest.approx(
        base_logprobs(untied(3), completion, updated), abs=1e-3
    )


def test_ranks_of_several_servers_follow_each_other(urls: Urls, tmp_path: Path) -> None:
    """Two ways to one server: both calls reach it."""
    info = {"file": str(tmp_path / "weights"), "rank_offset": 1, "world_size": 3}
    with Proxy(urls.base) as second, Pair.http([urls.base, second.url], urls.teacher) as pair:
        engine = http_engine(pair)
        assert engine.transfer_world_size == 2
        engine.init_weight_transfer_engine(info)
    inits = [json.loads(line) for line in (tmp_path / "weights.inits").read_text().splitlines()]
    assert sorted(init["rank_offset"] for init in inits) == [1, 2]
    assert {init["world_size"] for init in inits} == {3}


def test_a_trainer_reaches_the_servers_through_ours(urls: Urls, tmp_path: Path) -> None:
    """The calls of vLLM's own client for trainers, with a file where NCCL would be."""
    new, file = named(untied(5)), tmp_path / "weights"
    body = {"prompt": "Once upon a time", "max_tokens": 8, "seed": 1, "return_token_ids": True}

    def opened() -> Pair:
        return Pair.http(urls.base, urls.teacher, top_k=WHOLE, speculation="off")

    with run_server(opened, train=True, preset="exploratory", max_queued=None) as live:

        def post(path: str, body: dict[str, Any] | None = None) -> None:
            response = live.post(path, body)
            assert response.status_code == 200, response.text

        config = live.http.get("/server_info?config_format=json").json()["vllm_config"]
        assert config["weight_transfer_config"] == {"backend": "file"}
        assert live.http.get("/get_world_size").json() == {"world_size": 1}
        post("/init_weight_transfer_engine", {"init_info": {"file": str(file)}})
        write(new, file)
        post("/start_weight_update", {})
        post("/update_weights", {"update_info": announced(new)})
        post("/finish_weight_update", {"weight_version": "step 1"})
        post("/reset_prefix_cache")
        assert live.http.get("/weight_info").json() == {"weight_version": "step 1"}

        asked = {**body, "midlogit": {"diagnostics": True}}
        (choice,) = live.complete(asked.pop("prompt"), **asked)["choices"]
        ids = live.post("/tokenize", {"prompt": body["prompt"]}).json()["tokens"]
        picked = logprobs_after(untied(5), ids, choice["token_ids"])
        assert choice["midlogit"]["diagnostics"]["base_logprobs"] == pytest.approx(picked, abs=1e-3)
    with Pair.http(urls.base, urls.teacher) as pair:
        pair.update_base(saved(untied(0, 0.0), tmp_path / "first"))


def logprobs_after(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """Log-probabilities of ids after a prompt of ids under a plain model."""
    with torch.no_grad():
        rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return rows.log_softmax(-1)[range(len(ids)), ids].tolist()


def test_pause_and_resume(urls: Urls) -> None:
    with Pair.http(urls.base, urls.teacher, max_num_seqs=2) as pair:
        pair.pause()
        batch = pair.start(pair.prepare(QUESTIONS[:3], PARAMS, READING))
        assert batch.poll(0.2) is None
        pair.resume()
        assert [c.finish_reason for c in batch] == ["length"] * 3

        batch = pair.start(pair.prepare(QUESTIONS[:3], PARAMS, READING))
        pair.pause("wait")
        later = pair.start(pair.prepare(QUESTIONS[:1], PARAMS, READING))
        assert [c.finish_reason for c in batch] == ["length"] * 3
        assert later.poll(0.2) is None
        pair.resume()
        assert [c.finish_reason for c in later] == ["length"]

        batch = pair.start(pair.prepare(QUESTIONS[:3], PARAMS, READING))
        pair.pause("abort")
        assert {c.finish_reason for c in batch} == {"abort"}
        pair.resume()
        assert pair.generate(QUESTIONS[:1], PARAMS)[0].finish_reason == "length"
    with pytest.raises(EngineFailure):
        pair.resume()
