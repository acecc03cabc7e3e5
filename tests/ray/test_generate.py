"""`midlogit.ray.Generate` in pipelines of a real Ray: tokens, seeds, bad rows, killed actors, broken engines."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from midlogit import InvalidRequest, MidlogitError, Pair, SamplingParams
from midlogit.jobs import PairSource
from midlogit.ray import Generate, actor_pool
from tests.questions import QUESTIONS

PARAMS = SamplingParams(max_tokens=12, n=2, seed=5)
OPTIONS: dict[str, Any] = {
    "source": PairSource("local", options={"device": "cpu", "max_num_seqs": 4}),
    "params": PARAMS,
    "prompt_column": "question",
    "id_column": "key",
    "chat": True,
}
ROWS = [{"key": f"row {n}", "question": text, "topic": n} for n, text in enumerate(QUESTIONS)]


def pipeline(rows: list[dict[str, Any]], kind: type = Generate, **options: Any) -> list[dict]:
    """The rows that a pipeline makes of `rows`, in blocks of four."""
    sampled = ray.data.from_items(rows, override_num_blocks=(len(rows) + 3) // 4).map_batches(
        kind,
        batch_size=4,
        batch_format="pyarrow",
        num_cpus=0,
        fn_constructor_kwargs=OPTIONS | options,
        **actor_pool(),
    )
    return sorted(sampled.take_all(), key=lambda row: (row["topic"], row["sample"]))


def sample(rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """The rows that one call makes of `rows`, without Ray."""
    tables = list(Generate(**OPTIONS | options)(pa.Table.from_pylist(rows)))
    return pa.concat_tables(tables).to_pylist()


def expected(pair: Pair, rows: list[dict[str, Any]]) -> list[list[int]]:
    completions = pair.generate(
        [row["question"] for row in rows],
        PARAMS,
        chat=True,
        request_ids=[row["key"] for row in rows],
    )
    return [completion.token_ids for completion in completions]


def test_rows_are_the_input_and_its_completions(cluster: None, pair: Pair) -> None:
    """Two samples per row, with the tokens that the pair draws for rows of these ids."""
    rows = pipeline(ROWS)
    assert [row["token_ids"] for row in rows] == expected(pair, ROWS)
    assert [(row["key"], row["sample"]) for row in rows] == [
        (row["key"], n) for row in ROWS for n in range(2)
    ]
    first = rows[0]
    assert first["question"] == QUESTIONS[0] and first["text"] and first["error"] is None
    assert len(first["alpha"]) == len(first["token_ids"]) == first["completion_tokens"]
    assert {row["seed"] for row in rows} == {5}


def test_rows_come_in_the_order_of_the_input() -> None:
    """Ray drops outputs of a repeated call by their number, so their order must not depend on speed."""
    generate = Generate(**OPTIONS)
    tables = list(generate(pa.Table.from_pylist(ROWS)))
    assert len(tables) > 1
    topics = [topic for table in tables for topic in table["topic"].to_pylist()]
    assert topics == sorted(topics)


def test_bad_rows_have_errors_and_cost_no_other(pair: Pair) -> None:
    """An id that occurs twice is one request; rows without a prompt, without an id or too long are errors."""
    rows = [
        *ROWS[:3],
        {"key": "row 0", "question": QUESTIONS[0], "topic": 3},
        {"key": "empty", "question": "", "topic": 4},
        {"key": "none", "question": None, "topic": 5},
        {"key": None, "question": QUESTIONS[1], "topic": 6},
        {"key": "long", "question": "why " * 4000, "topic": 7},
    ]
    found = sample(rows)
    assert [row["token_ids"] for row in found[:6]] == expected(pair, ROWS[:3])
    assert [row["token_ids"] for row in found[6:8]] == expected(pair, ROWS[:1])
    assert all(row["finish_reason"] == "error" and not row["text"] for row in found[8:])
    said = ("empty", "no known form", "'key' is null", "context window")
    assert all(part in row["error"] for part, row in zip(said, found[8::2], strict=True))


def test_prompts_of_each_side_as_messages_and_ids(pair: Pair) -> None:
    prompts = [[{"role": "user", "content": text}] for text in QUESTIONS[:2]]
    rows = [
        {"key": "a", "question": prompts[0], "own": [5, 6, 7]},
        {"key": "b", "question": prompts[1], "own": None},
    ]
    completions = pair.generate(
        base_prompts=[[5, 6, 7], prompts[1]],
        teacher_prompts=prompts,
        params=PARAMS,
        request_ids=["a", "b"],
    )
    found = sample(rows, base_prompt_column="own", chat=False)
    assert [row["token_ids"] for row in found] == [c.token_ids for c in completions]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_column": "text"}, "no column 'text'. Its columns are 'key', 'question', 'topic'"),
        ({"id_column": None}, "Give params.seed and id_column, or neither."),
        ({"source": PairSource("local", "/nowhere", "/nowhere")}, "/nowhere"),
        ({"params": SamplingParams(seed=1, stop_token_ids=(10**6,))}, "1000000"),
    ],
)
def test_what_no_row_can_honour(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MidlogitError, match=re.escape(said)):
        sample(ROWS[:1], **options)


def test_other_tables() -> None:
    generate = Generate(**OPTIONS)
    with pytest.raises(InvalidRequest, match="columns that Generate adds: 'text'"):
        next(generate(pa.table({"key": ["a"], "question": ["Why?"], "text": ["Because."]})))
    with pytest.raises(InvalidRequest, match='batch_format="pyarrow"'):
        next(generate({"key": ["a"], "question": ["Why?"]}))


class Watched(Generate):
    """A Generate that appends its process to a file at each call, and then does what a test asks for."""

    def __init__(self, calls: Path, then: Callable[[Generate, int], None], **options: Any) -> None:
        super().__init__(**options)
        self._calls, self._then = calls, then

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        with self._calls.open("a") as file:
            file.write(f"{os.getpid()} {table['topic'][0].as_py()}\n")
        self._then(self, table["topic"][0].as_py())
        yield from super().__call__(table)


def calls(file: Path) -> list[list[int]]:
    return [[int(number) for number in line.split()] for line in file.read_text().splitlines()]


def test_an_actor_killed_while_it_runs(cluster: None, pair: Pair, tmp_path: Path) -> None:
    """Ray starts the actor and its calls again, and the rows are those of an undisturbed run."""
    file = tmp_path / "calls"

    def kill_once(generate: Generate, topic: int) -> None:
        if topic == 8 and [call[1] for call in calls(file)].count(8) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    rows = pipeline(ROWS, Watched, calls=file, then=kill_once)
    assert [row["token_ids"] for row in rows] == expected(pair, ROWS)
    assert len({process for process, _ in calls(file)}) == 2


def test_a_broken_engine_ends_its_actor(cluster: None, pair: Pair, tmp_path: Path) -> None:
    """No row is written as an error; the block runs again in another process."""
    file = tmp_path / "calls"

    def break_once(generate: Generate, topic: int) -> None:
        if topic == 8 and [call[1] for call in calls(file)].count(8) == 1:
            break_engine(generate)

    rows = pipeline(ROWS, Watched, calls=file, then=break_once)
    assert [row["token_ids"] for row in rows] == expected(pair, ROWS)
    assert len({process for process, _ in calls(file)}) == 2


def test_a_block_that_breaks_every_engine_fails_the_dataset(cluster: None, tmp_path: Path) -> None:
    file = tmp_path / "calls"

    def break_always(generate: Generate, topic: int) -> None:
        break_engine(generate)

    with pytest.raises(Exception, match=r"Attempt 3 of 3 failed: .*no such kernel"):
        pipeline(ROWS[:1], Watched, calls=file, then=break_always)
    assert len(calls(file)) == 3


def break_engine(generate: Generate) -> None:
    def step() -> None:
        raise RuntimeError("no such kernel")

    generate._pair.engine.step = step
