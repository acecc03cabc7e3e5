"""Weights that the base of a vLLM pair receives from a trainer, by a backend that reads a file; then a fresh pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from midlogit import InvalidRequest, Pair
from midlogit.engines.vllm.engine import VllmEngine
from midlogit.engines.vllm.options import require_vllm
from midlogit.errors import WeightMismatch
from tests.conftest import BASE, TEACHER
from tests.questions import QUESTIONS
from tests.updates import PARAMS, Named, base_logprobs, named, resident_mb, trained, update_midway
from tests.vllm.conftest import engine_of, open_pair, require_empty


@pytest.fixture(scope="module")
def received() -> Iterator[Pair]:
    require_vllm()
    from tests.file_transfer import NAME

    with open_pair(
        speculation="off", weight_transfer_config={"backend": NAME}, max_num_seqs=8
    ) as opened:
        yield opened


def info(weights: Named) -> dict[str, Any]:
    return {"names": list(weights), "shapes": [list(w.shape) for w in weights.values()]}


def send(engine: VllmEngine, weights: Named, file: Path, **finish: Any) -> None:
    """What a trainer does, in two calls."""
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    engine.start_weight_update()
    for names in (list(weights)[:9], list(weights)[9:]):
        engine.update_weights(info({name: weights[name] for name in names}))
    engine.finish_weight_update(**finish)


def test_running_requests_go_on_under_received_weights(received: Pair, tmp_path: Path) -> None:
    engine, model, file = engine_of(received), trained(2, 0.03), tmp_path / "weights"
    assert engine.transfer_backend == "file"
    with pytest.raises(InvalidRequest, match="No update has begun"):
        engine.finish_weight_update()
    engine.init_weight_transfer_engine({"file": str(file)})
    done = update_midway(received, lambda: send(engine, named(model), file, version="sent"))
    for completion in done:
        ((version, start, end),) = completion.weight_versions
        assert version == "sent" and 0 < start < end == 16
        after = base_logprobs(model, completion, received)[start:]
        assert completion.diagnostics.base_logprobs[start:] == pytest.approx(after, abs=1e-4)
    require_empty(received)


def test_what_does_not_fit_is_refused_before_it_is_received(received: Pair, tmp_path: Path) -> None:
    engine, file = engine_of(received), tmp_path / "weights"
    engine.init_weight_transfer_engine({"file": str(file)})
    expected = received.generate(QUESTIONS[:2], PARAMS)
    for wrong in ({"x": torch.ones(2)}, {"model.norm.weight": torch.ones(3)}):
        with pytest.raises(WeightMismatch, match="old weights stay"):
            send(engine, wrong, file)
    engine.start_weight_update()
    with pytest.raises(WeightMismatch, match="old weights stay"):
        engine.finish_weight_update()
    for one, other in zip(received.generate(QUESTIONS[:2], PARAMS), expected, strict=True):
        assert one.diagnostics.logprobs == pytest.approx(other.diagnostics.logprobs, abs=1e-6)


def test_a_trainer_that_dies_leaves_requests_waiting_for_the_next(
    received: Pair, tmp_path: Path
) -> None:
    engine, file, new = engine_of(received), tmp_path / "weights", named(trained(3))
    engine.init_weight_transfer_engine({"file": str(file)})
    part = dict(list(new.items())[:9])
    with pytest.raises(WeightMismatch, match="Requests wait until an update is complete"):
        send(engine, part, file)

    with pytest.raises(WeightMismatch, match="NaN"):
        send(engine, new | {"model.norm.weight": torch.full((192,), torch.nan)}, file)

    stream = received.stream(QUESTIONS[0], PARAMS, chat=True)
    send(engine, new, file)  # another trainer
    *_, completion = stream
    assert completion.diagnostics.base_logprobs == pytest.approx(
        base_logprobs(trained(3), completion, received), abs=1e-4
    )
    with pytest.raises(WeightMismatch):
        send(engine, part, file)
    received.update_base(new.items())
    (again,) = received.generate(QUESTIONS[:1], PARAMS, chat=True)
    assert again.token_ids == completion.token_ids
    send(engine, new, file)


def test_two_hundred_updates_leak_nothing(received: Pair) -> None:
    weights, sizes = named(trained(1)), []
    for n in range(220):
        stream = received.stream(QUESTIONS[0], PARAMS, chat=True)
        next(stream)
        received.update_base(weights.items(), running=("recompute", "keep", "abort")[n % 3])
        stream.close()  # type: ignore[attr-defined]
        sizes.append(resident_mb())
    received.pause("wait")
    received.resume()
    require_empty(received)
    assert max(sizes[20:]) - sizes[20] < 60


def test_three_updates_draw_as_a_fresh_pair_does(received: Pair, tmp_path: Path) -> None:
    """The last test here: a process holds one pair."""
    trained(3).save_pretrained(tmp_path)
    for n in range(1, 4):
        received.update_base(tmp_path if n == 3 else named(trained(n)).items(), version=n)
        found = received.generate(QUESTIONS[:4], PARAMS, chat=True)
        for completion in found:
            assert completion.weight_versions == [(n, 0, 16)]
            assert completion.diagnostics.base_logprobs == pytest.approx(
                base_logprobs(trained(n), completion, received), abs=1e-4
            )
    received.close()

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BASE / name).read_bytes())
    with open_pair(base=tmp_path, teacher=TEACHER, max_num_seqs=8) as fresh:
        expected = fresh.generate(QUESTIONS[:4], PARAMS, chat=True)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.diagnostics.logprobs == pytest.approx(other.diagnostics.logprobs, abs=1e-5)
