"""What a row of an input may hold: prompts, parameters, ids; each fault costs that row alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from midlogit import SamplingParams
from midlogit.jobs.inputs import Row, with_overrides
from tests.jobs.test_inputs import read, refused


def one(folder: Path, **values: Any) -> Row:
    (row,) = read(folder, json.dumps(values).encode())
    return row


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"not json", "not JSON"),
        (b'{"prompt":"\\ud800"}', "not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"prompt":"caf\xe9"}', "byte 0xe9 is not UTF-8. Save it as UTF-8, or name what it is, such as --encoding"),
        (b'{"text":"x"}', "has no 'prompt' or 'messages'. Its columns are 'text'"),
        (b"{}", "Its columns are none"),
        (b'{"prompt":null}', "has no 'prompt' or 'messages'"),
        (b'{"prompt":5}', "'prompt' is neither text nor messages nor token ids"),
        (b'{"prompt":["a"]}', "'prompt' is neither"),
        (b'{"prompt":[1,true]}', "'prompt' is neither"),
        (b'{"messages":[{"role":"user"},5]}', "'messages' is neither"),
        (b'{"prompt":[]}', "'prompt' is empty"),
        (b'{"prompt":"a","n":"two"}', "'n' is 'two', not a whole number. If it is no parameter, rename"),
        (b'{"prompt":"a","n":2.0}', "'n' is 2.0, not a whole number"),
        (b'{"prompt":"a","n":true}', "'n' is True, not a whole number"),
        (b'{"prompt":"a","n":0}', "'n' is 0: n is 0. It must lie in 1 to"),
        (b'{"prompt":"a","max_tokens":0}', "'max_tokens' is 0: .* at least 1"),
        (b'{"prompt":"a","temperature":-1}', "'temperature' is -1: .* positive number"),
        (b'{"prompt":"a","seed":"x"}', "'seed' is 'x', not a whole number"),
        (b'{"prompt":"a","stop":["x",5]}', "'stop' is .* not text or a list of texts"),
        (b'{"prompt":"a","stop":""}', "'stop' is '': A stop string is empty"),
        (b'{"prompt":"a","preset":"bold"}', "'preset' is 'bold': .* conservative, balanced, exploratory"),
        (b'{"prompt":"a","alpha_rule":"mid"}', "'alpha_rule' is 'mid': .* equal-kl"),
        (b'{"prompt":"a","alpha_rule":0.5}', "'alpha_rule' is 0.5, not text"),
        (b'{"prompt":"a","target_top_p":1.5}', "'target_top_p' is 1.5: .* lie in"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_costs_no_other(tmp_path: Path, data: bytes, says: str) -> None:
    good = b'{"prompt":"a","x":1}'
    first, bad, last = read(tmp_path, b"\n".join((good, data, good)))
    assert first.error is None and last.error is None and last.where.endswith("line 3")
    assert bad.error is not None
    assert re.search(says, bad.error), bad.error
    assert bad.where == f"{tmp_path / 'p.jsonl'}, line 2"


def test_overrides_are_those_of_the_row(tmp_path: Path) -> None:
    given = {
        "n": 3,
        "seed": 5,
        "max_tokens": 7,
        "temperature": 0,
        "stop": ["x", "y"],
        "alpha_rule": "fixed:0.25",
    }
    row = one(tmp_path, prompt="a", preset="exploratory", target_top_p=None, x=[1], **given)
    assert (
        row.overrides == {**given, "preset": "exploratory"}
        and row.carried == {"x": [1]}
        and row.error is None
    )

    job = SamplingParams.preset("conservative", min_tokens=2, seed=1)
    params = with_overrides(job, row.overrides)
    assert (params.n, params.seed, params.max_tokens, params.stop, params.min_tokens) == (
        3,
        5,
        7,
        ("x", "y"),
        2,
    )
    assert (params.force_first_token, params.constraint_to_target) == (False, False)
    assert params.alpha_rule.spec == "fixed:0.25" and with_overrides(job, {}) is job
    held = with_overrides(params, {"preset": "exploratory", "target_top_p": 0.5})
    assert (held.force_first_token, held.constraint_to_target, held.target_top_p) == (
        False,
        True,
        0.5,
    )
    with refused("min_tokens is 2"):
        with_overrides(job, {"max_tokens": 1})


def test_ids(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        b'{"id":"a","prompt":"x","custom_id":"c"}\n{"id":7,"prompt":"x"}\n{"id":null,"prompt":"x"}\n'
        b'{"prompt":"x"}\n{"id":1.5,"prompt":"x"}\n{"id":true,"prompt":"x"}\n{"id":"","prompt":"x"}\n',
    )
    assert [row.row_id for row in rows] == ["a", "7", None, None, None, None, None]
    assert rows[0].carried == {"custom_id": "c"} and rows[1].error is None
    for row, says in zip(
        rows[2:], ("no 'id'", "no 'id'", "is 1.5", "is True", "is ''"), strict=True
    ):
        assert row.error is not None and says in row.error

    rows = read(tmp_path, b'{"prompt":"x"}\n{"prompt":"x","id":1}\n{"prompt":"x"}')
    assert [row.error is None for row in rows] == [
        True,
        False,
        True,
    ] and "rows before it lack" in str(rows[1].error)
    rows = read(tmp_path, b'{"key":5,"prompt":"x","id":1}\n{"id":1,"prompt":"x"}', id="key")
    assert (rows[0].row_id, rows[0].carried) == ("5", {"id": 1}) and "no 'key'" in str(
        rows[1].error
    )
