"""Quantised folders are looked at before an engine sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from midlogit import ModelUnavailable
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.fit import require_fit
from midlogit.models.weights import weight_bytes
from tests.conftest import BASE
from tests.quantised import FORMATS, quantise

LAYER = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize("method", FORMATS)
def test_a_layer_that_is_missing_is_named(tmp_path: Path, method: str) -> None:
    folder, _ = quantise(tmp_path, BASE, method)
    checkpoint = Checkpoint.open(folder)
    require_fit(checkpoint)
    assert weight_bytes(checkpoint, 2) < 0.8 * weight_bytes(Checkpoint.open(BASE), 2)

    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if not n.startswith(LAYER)}, file)
    with pytest.raises(ModelUnavailable, match=f"lack {LAYER}.weight"):
        require_fit(checkpoint)
