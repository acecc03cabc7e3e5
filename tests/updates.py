"""A base that is trained while a pair draws from it: new weights, plain log-probabilities, updates midway."""

from __future__ import annotations

import itertools
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from midlogit import Completion, Pair, SamplingParams
from tests.conftest import BASE
from tests.questions import QUESTIONS

PARAMS = SamplingParams.preset("exploratory", max_tokens=16, seed=3, ignore_eos=True)
Named = dict[str, torch.Tensor]


def trained(seed: int, scale: float = 0.01) -> Any:
    """The bundled base after a step of training."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    return model


def named(model: torch.nn.Module) -> Named:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def base_logprobs(model: Any, completion: Completion, pair: Pair) -> list[float]:
    """Log-probabilities of a completion's tokens under a plain model."""
    ids = pair.mixing.base.encode_chat([{"role": "user", "content": completion.base_prompt}])
    with torch.no_grad():
        rows = model(torch.tensor([ids + completion.token_ids])).logits[0, len(ids) - 1 : -1]
    picked = rows.log_softmax(-1)[range(len(completion.token_ids)), completion.token_ids]
    return [float(x) for x in picked]


@contextmanager
def held_up(pair: Pair, after: int) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Stops the engine after so many steps, until the second event or until it is to make a call.

    Yields:
        (set when it has stopped, lets it go on)
    """
    reached, go = threading.Event(), threading.Event()
    engine: Any = pair.engine
    step, put = engine.step, engine._put
    steps = itertools.count(1)

    def counted() -> None:
        step()
        if next(steps) == after:
            reached.set()
            go.wait(60)

    def put_and_go(kind: str, content: list[Any]) -> None:
        put(kind, content)
        if kind == "call":
            go.set()

    engine.step, engine._put = counted, put_and_go
    try:
        yield reached, go
    finally:
        del engine.step, engine._put


def update_midway(
    pair: Pair,
    update: Callable[[], None],
    count: int = 6,
    after: int = 5,
    params: SamplingParams = PARAMS,
) -> list[Completion]:
    """Completions of requests, in whose midst the update is made, after some steps of the engine."""
    prompts = [QUESTIONS[n % len(QUESTIONS)] for n in range(count)]
    with ThreadPoolExecutor(2) as threads, held_up(pair, after) as (reached, go):
        done = threads.submit(pair.generate, prompts, params, chat=True, progress=False)
        assert reached.wait(60)
        try:
            threads.submit(update).result()
        finally:
            go.set()
        return done.result()


def resident_mb() -> float:
    """Resident memory of this process, in 10⁶ bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def torn(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in named(trained(1)).items()}, file)
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def changed(**changes: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
    weights: dict[str, torch.Tensor | None] = {**named(trained(1)), **changes}
    return ((name, weight) for name, weight in weights.items() if weight is not None)


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn": (torn, "cannot be read"),
    "empty": (lambda folder: folder, "no safetensors file"),
    "missing": (lambda _: changed(**{NORM: None}), f"missing: {NORM}"),
    "unknown": (lambda _: changed(**{"module.x": torch.ones(2)}), "no weight 'module.x'"),
    "nan": (lambda _: changed(**{NORM: torch.full((192,), torch.nan)}), "NaN or infinite"),
    "inf": (lambda _: changed(**{NORM: torch.full((192,), torch.inf)}), "NaN or infinite"),
    "shape": (lambda _: changed(**{NORM: torch.ones(191)}), r"the shape \[191\]"),
    "integers": (
        lambda _: changed(**{NORM: torch.ones(192, dtype=torch.long)}),
        "no floating numbers",
    ),
    "names": (lambda _: named(trained(1)), "pairs"),
}
