"""Damaged model folders, one fault per seed: each is loaded as its files say, or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from midlogit import (
    InvalidRequest,
    MidlogitError,
    ModelUnavailable,
    PairMismatch,
    SamplingParams,
)
from midlogit.cli.doctor import run_doctor
from midlogit.cli.loading import PairOptions
from tests.damage import damaged_pair
from tests.variants import SIDES, open_folders

SEEDS = range(int(os.environ.get("MIDLOGIT_FUZZ_SEEDS", "12")))
PARAMS = SamplingParams(max_tokens=6, seed=1)
CHAT = [[{"role": "user", "content": "Tell me a story."}]]


def weights_as_stored(model: torch.nn.Module, folder: Path) -> bool:
    """Whether every tensor of a folder is in the model, and no parameter is from elsewhere."""
    stored = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                stored[name] = opened.get_tensor(name)
    state = model.state_dict()
    names = {name if name in state else f"model.{name}": name for name in stored}
    return {name for name, _ in model.named_parameters()} <= names.keys() <= state.keys() and all(
        torch.equal(
            state[name].nan_to_num(), stored[names[name]].to(state[name].dtype).nan_to_num()
        )
        for name in names
    )


def texts(folder: Path) -> list[Any]:
    """What a newly opened pair draws, or the error that it is refused with."""
    try:
        with open_folders(folder, speculation="off") as pair:
            for side in SIDES:
                assert weights_as_stored(getattr(pair.engine, side).model, folder / side)
            found = pair.generate(["Once upon a time"], PARAMS)
            assert found[0].finish_reason != "error" or "NaN" in (found[0].error or "")
            try:
                found += pair.generate(CHAT, PARAMS)
            except InvalidRequest as error:
                return [found[0].token_ids, found[0].text, in_one_line(error, folder)]
            return [(c.token_ids, c.text, c.finish_reason) for c in found]
    except (ModelUnavailable, PairMismatch) as error:
        return [in_one_line(error, folder)]


def in_one_line(error: MidlogitError, folder: Path) -> str:
    said = str(error)
    assert "\n" not in said and len(said) < 600, said
    assert isinstance(error, PairMismatch) or str(folder) in said, said
    return said


@pytest.mark.filterwarnings("ignore")  # of libraries, about damaged files
@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_pair_is_loaded_as_it_says_or_refused(seed: int, tmp_path: Path, capsys) -> None:
    fault = damaged_pair(tmp_path / "pair", seed)
    first, second = texts(tmp_path / "pair"), texts(tmp_path / "pair")
    assert first == second, fault

    base, teacher = (str(tmp_path / "pair" / side) for side in SIDES)
    try:
        refused = run_doctor(PairOptions(base, teacher), "float32") != 0
    except (ModelUnavailable, PairMismatch):
        refused = True
    assert refused == (len(first) == 1) or "no model.safetensors" in str(first), (fault, first)
