"""A teacher with a stop id of its own, and a base with padding that holds mass, on vLLM as on the local engine."""

from __future__ import annotations

import pytest

from midlogit import Pair, SamplingParams
from tests.questions import QUESTIONS
from tests.vllm.conftest import engine_of, open_pair, require_empty
from tests.vllm.test_engine import require_equal
from tests.wider import with_heavy_padding, with_own_stop

PARAMS = SamplingParams(max_tokens=60, seed=1)


@pytest.mark.parametrize(
    ("alter", "speculation"), [(with_own_stop, "off"), (with_own_stop, 3), (with_heavy_padding, 3)]
)
def test_models_of_different_width_as_on_the_local_engine(tmp_path, alter, speculation) -> None:
    base, teacher = alter(tmp_path)
    with Pair.local(base, teacher, dtype="float32", device="cpu") as local:
        expected = local.generate(QUESTIONS[:8], PARAMS, chat=True)
    trusted = speculation == "off"
    with open_pair(
        base=base, teacher=teacher, speculation=speculation, trust_remote_code=trusted
    ) as pair:
        for core in engine_of(pair).cores:
            assert core._core.vllm_config.model_config.trust_remote_code is trusted
        require_equal(pair.generate(QUESTIONS[:8], PARAMS, chat=True), expected)
        require_empty(pair)
    if alter is with_own_stop:
        assert sum(completion.token_ids[-1] == 4096 for completion in expected) >= 4
