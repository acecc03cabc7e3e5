"""Exports of jobs that the bundled pair ran: contents of each format, refusals, targets that appear whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from typer.testing import CliRunner

from midlogit import Pair, SamplingParams
from midlogit.cli.main import app
from midlogit.errors import InvalidRequest
from midlogit.jobs import Job, StorageFailure
from midlogit.jobs.exports import FORMATS, export
from midlogit.jobs.exports.results import SLICE
from midlogit.jobs.part_files import read_metadata, write_part
from midlogit.models.checkpoint import Checkpoint
from midlogit.requests.prompts import Reading
from tests.conftest import BASE, TEACHER
from tests.jobs.small_jobs import CHATS, TEXTS, TOO_LONG, planned, run

ANSWERS = {"answer": ["a building", "?", "blue", "hello"]}
PLAIN_CHATS = [
    [{"role": "user", "content": "What is a lighthouse?"}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Name a colour."},
    ],
    [{"role": "user", "content": "Say hello."}],
]
SHORT = SamplingParams(max_tokens=2)


@pytest.fixture(scope="session")
def chats(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("jobs") / "chats"
    return run(pair, folder, CHATS, columns=ANSWERS)


@pytest.fixture(scope="session")
def texts(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("jobs") / "texts"
    return run(pair, folder, TEXTS, columns=ANSWERS)


def results(job: Job) -> list[dict[str, Any]]:
    """The rows of a job's results that are no errors."""
    rows = pa.concat_tables(job.tables()).to_pylist()
    return [row for row in rows if row["error"] is None]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()
    ]


def test_trl_sft_has_conversations_and_log_probabilities(chats: Job, tmp_path: Path) -> None:
    found = export(chats, "trl-sft", tmp_path / "out.parquet")
    assert (found.rows, found.errors) == (6, 2)
    prompts = dict(zip(("row-0", "row-2", "row-3"), PLAIN_CHATS, strict=True))
    for row, result in zip(rows_of(found.path), results(chats), strict=True):
        assert row["prompt"] == prompts[result["row_id"]]
        assert row["completion"] == [{"role": "assistant", "content": result["text"]}]
        for name in ("row_id", "sample", "token_ids", "finish_reason", "answer"):
            assert row[name] == result[name]
        assert row["q_logprobs"] == result["logprobs"] and row["temperature"] == 1.0
        for side in ("base", "teacher"):
            assert row[f"{side}_logprobs"] == result[f"{side}_tempered_logprobs"]
            assert row[f"{side}_bound"] == [0.0] * len(row["token_ids"])

    facts = read_metadata(found.path)
    assert facts["job"]["fingerprint"] == chats.manifest.fingerprint
    assert "the row's temperature" in facts["columns"]["base_logprobs"]
    assert pq.ParquetFile(found.path).num_row_groups == chats.manifest.parts


def test_trl_sft_has_text_where_prompts_are_text(texts: Job, tmp_path: Path) -> None:
    found = export(texts, "trl-sft", tmp_path / "out.parquet")
    for row, result in zip(rows_of(found.path), results(texts), strict=True):
        assert (row["prompt"], row["completion"]) == (result["prompt"], result["text"])
    truncated = sum(row["finish_reason"] == "length" for row in results(texts))
    assert found.notes == (
        f"{truncated} completions have finish_reason length; SFTTrainer ends them with a stop token, too.",
    )


def test_trl_prompt_has_each_row_once(chats: Job, tmp_path: Path) -> None:
    found = export(chats, "trl-prompt", tmp_path / "out.parquet")
    assert rows_of(found.path) == [
        {"prompt": prompt, "row_id": row_id, "answer": answer}
        for prompt, row_id, answer in zip(
            PLAIN_CHATS, ("row-0", "row-2", "row-3"), ("a building", "blue", "hello"), strict=True
        )
    ]


def test_verl_rl_makes_what_the_input_has_not(texts: Job, tmp_path: Path) -> None:
    found = export(texts, "verl-rl", tmp_path / "out.parquet")
    assert found.rows == 3 and "user messages" in found.notes[0]
    assert rows_of(found.path)[1] == {
        "data_source": "midlogit",
        "prompt": [{"role": "user", "content": "The sea was calm, and"}],
        "ability": "general",
        "reward_model": {"style": "rule", "ground_truth": "blue"},
        "extra_info": {"answer": "blue", "row_id": "row-2", "index": 1},
    }


def test_verl_rl_keeps_what_the_input_has(pair: Pair, tmp_path: Path) -> None:
    own = {
        "data_source": ["gsm8k", "math"],
        "ability": ["math", "math"],
        "reward_model": [{"style": "rule", "ground_truth": "72"}, {"style": "model"}],
        "extra_info": [{"split": "train", "index": 7}, {"split": "test", "index": 9}],
        "difficulty": [1, 2],
    }
    job = run(pair, tmp_path / "job", ["A", "B"], params=SHORT, columns=own)
    first, second = rows_of(export(job, "verl-rl").path)
    assert first["data_source"] == "gsm8k" and second["data_source"] == "math"
    assert first["reward_model"] == {"style": "rule", "ground_truth": "72"}
    assert first["extra_info"] == {
        "difficulty": 1,
        "split": "train",
        "index": 7,
        "row_id": "row-0",
    }


def test_verl_sft_has_whole_conversations(chats: Job, tmp_path: Path) -> None:
    found = export(chats, "verl-sft", tmp_path / "out.parquet")
    row, result = rows_of(found.path)[2], results(chats)[2]
    answer = {"role": "assistant", "content": result["text"]}
    assert row["messages"] == [*PLAIN_CHATS[1], answer]
    assert row["token_ids"] == result["token_ids"] and row["q_logprobs"] == result["logprobs"]


def test_slime_rl_has_labels_and_metadata(chats: Job, texts: Job, tmp_path: Path) -> None:
    for name, job, prompts in (("c", chats, PLAIN_CHATS), ("t", texts, [TEXTS[0], *TEXTS[2:]])):
        found = export(job, "slime-rl", tmp_path / name)
        answers = ("a building", "blue", "hello")
        assert rows_of(found.path) == [
            {"prompt": prompt, "label": answer, "metadata": {"row_id": row_id}}
            for prompt, answer, row_id in zip(
                prompts, answers, ("row-0", "row-2", "row-3"), strict=True
            )
        ]


def test_slime_rl_has_the_policys_prompt(pair: Pair, tmp_path: Path) -> None:
    own = {"label": ["1"], "metadata": [{"source": "books"}], "level": [3]}
    job = run(pair, tmp_path / "job", ["A"], params=SHORT, columns={**own, "base_prompt": ["B"]})
    assert rows_of(export(job, "slime-rl").path) == [
        {
            "prompt": "B",
            "label": "1",
            "metadata": {
                "row_id": "row-0",
                "level": 3,
                "source": "books",
                "teacher_prompt": "A",
            },
        }
    ]


@pytest.mark.parametrize("side", ["q", "teacher"])
def test_axolotl_candidates_stand_before_their_tokens(
    chats: Job, tmp_path: Path, side: str
) -> None:
    found = export(chats, "axolotl-kd", tmp_path / "out.parquet", top_of=side)
    teacher = Checkpoint.open(TEACHER)
    prompts = dict(zip(("row-0", "row-2", "row-3"), PLAIN_CHATS, strict=True))
    for row, result in zip(rows_of(found.path), results(chats), strict=True):
        prompt = teacher.encode_chat(prompts[result["row_id"]])
        assert row["input_ids"] == [*prompt, *result["token_ids"]]
        assert row["labels"] == [-100] * len(prompt) + result["token_ids"]
        assert row["attention_mask"] == [1] * len(row["input_ids"])

        first, last = len(prompt) - 1, len(row["input_ids"]) - 1
        assert row["target_token_ids"][first:last] == result[f"top_{side}_ids"]
        outside = row["target_token_ids"][:first] + row["target_token_ids"][last:]
        assert outside == [[]] * (len(prompt))
        for got, stored, mask in zip(
            row["target_logprobs"][first:last],
            result[f"top_{side}_logprobs"],
            row["target_mask"][first:last],
            strict=True,
        ):
            wanted = np.asarray(stored) - np.logaddexp.reduce(stored)
            np.testing.assert_allclose(got, wanted, atol=1e-6)
            assert mask == [1] * len(got)


def test_axolotl_encodes_text_as_it_was_sampled_from(texts: Job, tmp_path: Path) -> None:
    found = export(texts, "axolotl-kd", tmp_path / "out.parquet")
    row, result = rows_of(found.path)[0], results(texts)[0]
    assert row["input_ids"] == [*Checkpoint.open(TEACHER).encode(TEXTS[0]), *result["token_ids"]]


def test_axolotl_refuses_what_it_cannot_line_up(pair: Pair, chats: Job, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"chat template of .* is not the job's.*--tokenizer"):
        export(chats, "axolotl-kd", tmp_path / "out", tokenizer=BASE)
    with pytest.raises(InvalidRequest, match="no candidates of 'base'"):
        export(chats, "axolotl-kd", tmp_path / "out", top_of="base")

    job = run(pair, tmp_path / "job", ["A"], params=SHORT)
    with pytest.raises(InvalidRequest, match=r"stored none.*--top-logprobs"):
        export(job, "axolotl-kd")
    assert not (tmp_path / "out").exists() and not list(job.path.glob("exports/*"))


def test_openai_lines_are_read_by_the_client(chats: Job, texts: Job, tmp_path: Path) -> None:
    of_chats = lines_of(export(chats, "openai", tmp_path / "chats.jsonl").path)
    of_texts = lines_of(export(texts, "openai", tmp_path / "texts.jsonl").path)
    for job, lines, kind in ((chats, of_chats, ChatCompletion), (texts, of_texts, Completion)):
        assert [line["custom_id"] for line in lines] == ["row-0", "row-1", "row-2", "row-3"]
        assert len({line["id"] for line in lines}) == 4
        done = [line for line in lines if line["error"] is None]
        for number, line in enumerate(done):
            assert line["response"]["status_code"] == 200 and line["response"]["request_id"]
            body = kind.model_validate(line["response"]["body"], strict=True)
            wanted = results(job)[2 * number : 2 * number + 2]
            assert [choice.index for choice in body.choices] == [0, 1]
            assert body.usage is not None
            assert body.usage.completion_tokens == sum(len(row["token_ids"]) for row in wanted)
            for choice, row in zip(line["response"]["body"]["choices"], wanted, strict=True):
                text = choice["message"]["content"] if kind is ChatCompletion else choice["text"]
                assert text == row["text"] and choice["token_ids"] == row["token_ids"]
                assert choice["finish_reason"] == row["finish_reason"]
                for name in ("base_logprobs", "base_tempered_logprobs"):
                    assert choice["midlogit"]["diagnostics"][name] == row[name]

    first, row = of_chats[0]["response"]["body"]["choices"][0]["logprobs"], results(chats)[0]
    assert [entry["logprob"] for entry in first["content"]] == row["logprobs"]
    assert first["content"][0]["token"] == f"token_id:{row['token_ids'][0]}"
    assert len(first["content"][5]["top_logprobs"]) == len(row["top_q_ids"][5])


def test_openai_lines_tell_errors(chats: Job, tmp_path: Path) -> None:
    found = export(chats, "openai", tmp_path / "out.jsonl")
    line = lines_of(found.path)[1]
    assert (found.rows, found.errors) == (4, 2)
    assert line["response"]["status_code"] == 400 and "1202 tokens" in line["error"]["message"]
    assert line["response"]["body"]["error"]["message"] == line["error"]["message"]


def test_openai_tells_one_failed_sample(pair: Pair, tmp_path: Path) -> None:
    job = run(pair, tmp_path / "job", ["A"], params=SamplingParams(n=2, max_tokens=2))
    rewrite(job, error=["It broke.", None])
    (line,) = lines_of(export(job, "openai").path)
    assert line["response"]["status_code"] == 200
    assert [choice["index"] for choice in line["response"]["body"]["choices"]] == [1]
    assert line["error"] == {
        "code": "invalid_request",
        "message": "Sample 0 of 2 failed: It broke.",
    }


def rewrite(job: Job, **columns: Any) -> None:
    """Replaces columns of the first part."""
    path = job.path / "data" / "part-00000.parquet"
    table, metadata = pq.read_table(path), read_metadata(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    write_part(path, job.path / "tmp", table, metadata, replace=True)


def test_jsonl_has_every_column_and_no_infinities(chats: Job, tmp_path: Path) -> None:
    found = export(chats, "jsonl", tmp_path / "out.jsonl")
    lines = lines_of(found.path)
    assert (len(lines), found.errors) == (8, 2)
    rows = pa.concat_tables(chats.tables()).to_pylist()
    for line, row in zip(lines, rows, strict=True):
        assert line.keys() == {*row, "temperature"}
        assert {name: line[name] for name in row if name != "prompt"} == {
            name: value for name, value in row.items() if name != "prompt"
        }
    assert lines[2]["prompt"] == TOO_LONG and lines[0]["prompt"] == CHATS[0]


def test_infinities_are_null_or_vllms_number(pair: Pair, tmp_path: Path) -> None:
    job = run(pair, tmp_path / "job", ["A"], params=SamplingParams(max_tokens=1))
    rewrite(job, base_logprobs=[[float("-inf")]], logprobs=[[float("-inf")]])
    (line,) = lines_of(export(job, "jsonl").path)
    assert line["base_logprobs"] == [None]
    (line,) = lines_of(export(job, "openai").path)
    (choice,) = line["response"]["body"]["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]
    assert choice["midlogit"]["diagnostics"]["base_logprobs"] == [-9999.0]


@pytest.mark.parametrize("to", ["datasets", "trl-sft", "trl-prompt", "verl-rl", "verl-sft"])
def test_datasets_loads_it(chats: Job, tmp_path: Path, to: str) -> None:
    found = export(chats, to, tmp_path / f"out{FORMATS[to].suffix}")
    cache = str(tmp_path / "cache")
    if to == "datasets":
        loaded = datasets.load_dataset(str(found.path), split="train", cache_dir=cache)
        assert loaded[0]["prompt"] == PLAIN_CHATS[0] and "base_prompt" not in loaded.features
        assert loaded["token_ids"] == [row["token_ids"] for row in results(chats)]
        assert loaded["alpha"] == [row["alpha"] for row in results(chats)]
    else:
        loaded = datasets.load_dataset(
            "parquet", data_files=str(found.path), split="train", cache_dir=cache
        )
    assert len(loaded) == found.rows


def test_prompts_of_each_side(pair: Pair, tmp_path: Path) -> None:
    own = {"base_prompt": [PLAIN_CHATS[2], PLAIN_CHATS[0]]}
    prompts = [PLAIN_CHATS[0], PLAIN_CHATS[1]]
    job = run(pair, tmp_path / "job", prompts, params=SHORT, columns=own)
    for to in ("trl-sft", "trl-prompt"):
        assert [row["base_prompt"] for row in rows_of(export(job, to).path)] == own["base_prompt"]
    loaded = datasets.load_dataset(
        str(export(job, "datasets").path), split="train", cache_dir=str(tmp_path)
    )
    assert loaded["base_prompt"] == own["base_prompt"]


def test_text_of_a_chat_is_a_user_message(pair: Pair, tmp_path: Path) -> None:
    job = run(pair, tmp_path / "job", ["Hi"], params=SHORT, reading=Reading(chat=True))
    (row,) = rows_of(export(job, "trl-sft").path)
    assert row["prompt"] == [{"role": "user", "content": "Hi"}]
    (line,) = lines_of(export(job, "openai").path)
    assert line["response"]["body"]["object"] == "chat.completion"


def test_names_of_messages_stay(pair: Pair, tmp_path: Path) -> None:
    prompts: list[Any] = [[{"role": "user", "content": "Hi", "name": "ann"}], PLAIN_CHATS[0]]
    job = run(pair, tmp_path / "job", prompts, params=SHORT)
    found = [row["prompt"][0]["name"] for row in rows_of(export(job, "trl-prompt").path)]
    assert found == ["ann", None]


def test_a_row_of_its_own_temperature_keeps_it(pair: Pair, tmp_path: Path) -> None:
    own = {"temperature": [0.5, None, 0.0]}
    job = run(pair, tmp_path / "job", ["A", "B", "C"], params=SHORT, columns=own)
    for to in ("trl-sft", "verl-sft"):
        assert [row["temperature"] for row in rows_of(export(job, to).path)] == [0.5, 1.0, 0.0]


def test_columns_that_readers_take_for_theirs_are_renamed(pair: Pair, tmp_path: Path) -> None:
    own = {"completion": ["x"], "tools": ["t"], "images": ["i"]}
    job = run(pair, tmp_path / "job", ["A"], params=SHORT, columns=own)
    found = export(job, "trl-sft")
    (row,) = rows_of(found.path)
    assert (row["input_completion"], row["tools"], row["input_images"]) == ("x", "t", "i")
    assert "renamed: completion to input_completion, images to input_images" in found.notes[0]


def test_without_diagnostics_there_are_no_log_probabilities(pair: Pair, tmp_path: Path) -> None:
    job = run(pair, tmp_path / "job", ["A"], params=SHORT, diagnostics="none")
    for to in set(FORMATS) - {"axolotl-kd"}:
        found = export(job, to)
        assert found.rows == 1
        if FORMATS[to].suffix == ".parquet":
            assert not any("logprobs" in name for name in pq.read_schema(found.path).names)


def test_token_ids_as_prompts(pair: Pair, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=2, top_logprobs=2)
    job = run(pair, tmp_path / "job", [[300, 301], [302]], params=params)
    for to in ("trl-sft", "trl-prompt", "verl-rl", "verl-sft"):
        with pytest.raises(InvalidRequest, match=f"token ids, and {to} has text or messages"):
            export(job, to)
    assert [line["prompt"] for line in lines_of(export(job, "jsonl").path)] == [[300, 301], [302]]
    ids = [row["input_ids"][:-2] for row in rows_of(export(job, "axolotl-kd").path)]
    assert ids == [[300, 301], [302]]
    folder = str(export(job, "datasets").path)
    loaded = datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path))
    assert loaded["prompt"] == [[300, 301], [302]]


def test_more_completions_than_are_held_at_once(pair: Pair, tmp_path: Path) -> None:
    params = SamplingParams(n=SLICE + 1, max_tokens=1, top_logprobs=1)
    job = run(pair, tmp_path / "job", ["A"], params=params)
    assert len(rows_of(export(job, "axolotl-kd").path)) == SLICE + 1
    assert len(lines_of(export(job, "jsonl").path)) == SLICE + 1
    (line,) = lines_of(export(job, "openai").path)
    assert len(line["response"]["body"]["choices"]) == SLICE + 1


def test_refusals_come_before_anything_is_written(pair: Pair, tmp_path: Path) -> None:
    mixed = run(pair, tmp_path / "mixed", [*PLAIN_CHATS[:1], "A"], params=SHORT)
    with pytest.raises(InvalidRequest, match=r"row 'row-1' is text, .* before it is messages"):
        export(mixed, "trl-sft")
    assert len(lines_of(export(mixed, "jsonl").path)) == 2

    broken = run(pair, tmp_path / "broken", [TOO_LONG], params=SHORT)
    with pytest.raises(InvalidRequest, match="every row is an error"):
        export(broken, "verl-sft")
    candidates = SamplingParams(max_tokens=2, top_logprobs=2)
    wrong = run(pair, tmp_path / "wrong", [TOO_LONG], params=candidates)
    with pytest.raises(InvalidRequest, match="every row is an error"):
        export(wrong, "axolotl-kd")

    undone = planned(tmp_path / "undone", ["A", "B", "C"], params=SHORT)
    with pytest.raises(InvalidRequest, match=r"2 of 2 parts of .* are not done.*reads .*data"):
        export(undone, "jsonl")

    with pytest.raises(InvalidRequest, match=r"no format 'trl'.*trl-sft, trl-prompt, verl-rl"):
        export(mixed, "trl")
    with pytest.raises(InvalidRequest, match="jsonl has no candidates"):
        export(mixed, "jsonl", tmp_path / "other", top_of="q")
    with pytest.raises(InvalidRequest, match=r"is there already.*--out"):
        export(mixed, "jsonl")
    with pytest.raises(StorageFailure, match=r"Cannot write .*File exists"):
        export(mixed, "jsonl", mixed.path / "README.md" / "out.jsonl")
    for job in (mixed, broken, undone):
        assert [path.name for path in job.path.glob("exports/*")] == ["jsonl.jsonl"] * (
            job is mixed
        )


@pytest.mark.parametrize("to", ["trl-sft", "openai", "datasets"])
def test_a_target_appears_whole_or_not_at_all(pair: Pair, tmp_path: Path, to: str) -> None:
    job = run(pair, tmp_path / "job", ["A", "B", "C"], params=SHORT)
    last = job.path / "data" / "part-00001.parquet"
    data = bytearray(last.read_bytes())
    data[4:200] = bytes(196)  # its pages, not its footer
    last.write_bytes(data)
    with pytest.raises(InvalidRequest, match=r"cannot be read: .*midlogit batch verify"):
        export(job, to, tmp_path / "out" / "target")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_says_what_it_wrote(texts: Job, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    command = ["batch", "export", str(texts.path), "--to", "verl-sft", "--out", str(out)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    assert f"{out}: 6 rows, 2 completions with errors left out.\n" in ran.stdout
    assert "Prompts of text became user messages" in ran.stderr
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0 and "is there already" in str(again.exception)
