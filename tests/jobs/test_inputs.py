"""Rows of the inputs of a job: every format by its real writer, every fault, order, laziness."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import itertools
import json
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midlogit.errors import InvalidRequest, MissingExtra
from midlogit.jobs.inputs import Columns, Row, read_rows
from midlogit.jobs.inputs.fields import Fields
from midlogit.jobs.inputs.reading import line_rows

CHAT = [{"role": "user", "content": "hi"}]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def read(
    folder: Path, data: bytes, name: str = "p.jsonl", encoding: str = "utf-8", **columns: str
) -> list[Row]:
    (folder / name).write_bytes(data)
    return list(read_rows([folder / name], Columns(**columns), encoding))


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def lines(rows: list[Row]) -> list[int]:
    return [int(row.where.rpartition(" ")[2]) for row in rows]


def refused(says: str) -> pytest.RaisesExc[InvalidRequest]:
    return pytest.raises(InvalidRequest, match=says)


PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACKED)
def test_text_and_json_lines(tmp_path: Path, packed: str) -> None:
    rows = read(
        tmp_path, PACKED[packed](b"\xef\xbb\xbfa\n\n \r\nb \rc\xe2\x80\xa8d"), f"p.TXT{packed}"
    )
    assert [row.prompt for row in rows] == ["a", "b ", "c\u2028d"]
    assert rows[1] == Row(f"{tmp_path / 'p.TXT'}{packed}, line 4", prompt="b ")

    data = (
        b'\xef\xbb\xbf{"prompt":"a","k":{"x":[1,null,2.5,true]}}\r\n\n'
        b'{"messages":[{"role":"user","content":"hi"}]}\n{"prompt":[5,6]}'
    )
    for name in (f"p.jsonl{packed}", f"p.ndjson{packed}"):
        rows = read(tmp_path, PACKED[packed](data), name)
        assert [row.prompt for row in rows] == ["a", CHAT, [5, 6]]
        assert lines(rows) == [1, 3, 4] and rows[0].carried == {"k": {"x": [1, None, 2.5, True]}}


def test_parquet_and_datasets(tmp_path: Path) -> None:
    other = {
        "day": pa.array([datetime.date(2026, 1, 2), None]),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "raw": pa.array([b"\xff", b""]),
        "pairs": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int8())),
        "when": pa.array([datetime.datetime(2026, 1, 2), None]),
    }
    columns = {
        "custom_id": [7, 8],
        "q": ['[{"role": "user"}]', "b"],
        "ids": pa.array([[1, 2], [3]], pa.list_(pa.uint16())),
        "m": [CHAT, CHAT],
        "n": [2, None],
    }
    file = parquet(tmp_path / "p.parquet", **columns, **other)
    first, second = read_rows([file], Columns(prompt="q", base_prompt="m"))
    assert (first.row_id, first.prompt, first.base_prompt, first.overrides) == (
        "7",
        '[{"role": "user"}]',
        CHAT,
        {"n": 2},
    )
    assert second.where == f"{file}, row 2" and second.overrides == {} and first.error is None
    assert first.carried == {
        "ids": [1, 2], "day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50"), "kind": "a", "raw": b"\xff",
        "pairs": [("k", 1)], "when": datetime.datetime(2026, 1, 2),
    }  # fmt: skip
    assert [row.prompt for row in read_rows([file], Columns(prompt="ids"))] == [[1, 2], [3]]

    table = datasets.Dataset.from_list(
        [{"id": f"r{i}", "messages": CHAT, "score": i / 2} for i in range(3)]
    )
    table.select([2, 0]).save_to_disk(tmp_path / "set")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    rows = list(read_rows([tmp_path / "set"]))
    assert [(row.row_id, row.prompt, row.carried) for row in rows] == [
        ("r2", CHAT, {"score": 1.0}),
        ("r0", CHAT, {"score": 0.0}),
    ]
    assert [row.row_id for row in read_rows([tmp_path / "one"])] == ["r0", "r1", "r2"]
    assert len(list(read_rows([tmp_path / "two" / "test"]))) == 3
    with refused("has the splits train, test. Name the folder of one, such as .*two/train"):
        list(read_rows([tmp_path / "two"]))
    with refused("set has no column 'q'. Its columns are 'id', 'messages', 'score'"):
        list(read_rows([tmp_path / "set"], Columns(prompt="q")))


def test_paths_and_folders_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    parquet(folder / "b.parquet", prompt=["2", "3"])
    (folder / "a.jsonl").write_text('{"prompt":"1"}\n')
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt":"4"}\n'))
    for name in ("README.md", "notes.txt", ".d.jsonl"):
        (folder / name).write_text("no row\n")
    (tmp_path / "last.txt").write_text("5")
    (tmp_path / "empty.txt").write_text("")
    paths = [folder, tmp_path / "empty.txt", tmp_path / "last.txt"]
    assert [row.prompt for row in read_rows(paths)] == list("12345")
    assert [row.prompt for row in read_rows(paths)] == list("12345")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("p.json", b"[]", "of no known format. Its name must end in .txt, .jsonl, .ndjson .*gz or .zst.*parquet"),
        ("p", b"", "no known format"),
        ("p.parquet.gz", b"", "no known format"),
        ("p.txt", b"\n \n", "There is no prompt in .*p.txt"),
        ("p.parquet", b"PAR1 not really", "p.parquet beyond row 0: .* damaged, or no Parquet"),
        ("p.jsonl.gz", b'{"prompt":"a"}\n', "p.jsonl.gz beyond line 0: Not a gzipped file"),
        ("p.jsonl.zst", b'{"prompt":"a"}\n', "p.jsonl.zst beyond line 0: ZSTD"),
        ("p.txt", "a\nb".encode("utf-16"), "line 1: this is UTF-16, not UTF-8. Use --encoding utf-16"),
        ("p.txt", b"\xfe\xff\0a", "this is UTF-16"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    with refused(says):
        read(tmp_path, data, name)


def test_a_file_that_is_cut_off_names_the_line(tmp_path: Path) -> None:
    data = b"".join(b'{"prompt":"%d"}\n' % (i * i) for i in range(50_000))
    for suffix, says in ((".gz", "Compressed file ended"), (".zst", "Truncated")):
        packed = PACKED[suffix](data)
        with refused(rf"p.jsonl{suffix} beyond line \d{{3,}}: {says}.*It may be cut off"):
            read(tmp_path, packed[: len(packed) * 3 // 4], f"p.jsonl{suffix}")

    file = parquet(tmp_path / "p.parquet", prompt=["a"] * 10)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with refused("p.parquet beyond row 0"):
        list(read_rows([file]))
    file.write_bytes(whole[:8] + bytes(40) + whole[48:])
    with refused("p.parquet beyond row 0"):
        list(read_rows([file]))


def test_what_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("a")
    for name, says in (
        ("none.txt", "Cannot read .*none.txt: No such file"),
        ("empty", "empty is a folder without .jsonl, .ndjson or .parquet files"),
        ("a" * 999, "too long"),
        ("p.txt/q.txt", "Not a directory"),
    ):  # fmt: skip
        with refused(says):
            read_rows([tmp_path / "p.txt", tmp_path / name])
    for encoding in ("utf-9", "hex", "undefined"):
        with refused(f"--encoding is '{encoding}'"):
            read_rows([tmp_path / "p.txt"], encoding=encoding)


def test_columns_that_were_named_and_are_not_there(tmp_path: Path) -> None:
    with refused("p.jsonl has no column 'q'. Its columns are 'prompt', 'x'"):
        read(tmp_path, b'{"prompt":"a","x":1}\n{"y":2}\n', prompt="q")
    file = parquet(tmp_path / "p.parquet", prompt=["a"], x=[1])
    for columns in (Columns(prompt="q"), Columns(base_prompt="q"), Columns(id="q")):
        with refused("p.parquet has no column 'q'. Its columns are 'prompt', 'x'"):
            list(read_rows([file], columns))

    rows = read(tmp_path, b'{"prompt":"a"}\n{"prompt":"b","c":[5]}\n', base_prompt="c")
    assert rows[0].error == "It has no 'c'. Its columns are 'prompt'." and rows[1].base_prompt == [
        5
    ]


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("latin-1", b"caf\xe9\nb"),
        ("utf-16", "café\nb".encode("utf-16")),
        ("utf-16-be", "\ufeffcafé\r\nb".encode("utf-16-be")),
    ],
)
def test_encodings(tmp_path: Path, encoding: str, data: bytes) -> None:
    assert [row.prompt for row in read(tmp_path, data, "p.txt", encoding)] == ["café", "b"]


def test_bytes_of_another_encoding(tmp_path: Path) -> None:
    rows = read(tmp_path, b"a\r\ncaf\xe9\nb", "p.txt")
    assert [row.prompt for row in rows] == ["a", None, "b"] and "0xe9 is not UTF-8" in str(
        rows[1].error
    )
    rows = read(tmp_path, b"a\n\x81\nb", "p.txt", "cp1252")
    assert [row.prompt for row in rows] == ["a", None, "b"] and "0x81 is not CP1252" in str(
        rows[1].error
    )
    rows = read(tmp_path, "aé".encode("utf-16")[:-1], "p.txt", "utf-16")
    assert "0xe9 is not UTF-16" in str(rows[0].error)
    with refused("p.txt, line 2: it is not UTF-16: truncated data"):
        read(tmp_path, "a\nbc".encode("utf-16")[:-1], "p.txt", "utf-16")


def test_values_of_parquet_that_python_cannot_hold(tmp_path: Path) -> None:
    text = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    rows = list(read_rows([parquet(tmp_path / "p.parquet", prompt=text)]))
    assert [row.prompt for row in rows] == ["a", None, "c"]
    assert rows[1].where.endswith("row 2") and "cannot be read: 'utf-8' codec" in str(rows[1].error)


ODD = st.text(st.sampled_from("aé\u2028\u2029\x85\x0b\x0c\x1c\t 😀"), min_size=1, max_size=8)
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\r \r\n"])


@given(st.lists(st.tuples(ODD, ENDS), max_size=12), st.sampled_from([3, 7, 8192]))
@settings(max_examples=50)
def test_lines_are_counted_by_their_ends(values: list[tuple[str, str]], buffer: int) -> None:
    """Blank lines in between, any mix of ends, every other separator of Unicode inside the texts."""
    data = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + end for text, end in values)
    numbers = [n for n, line in enumerate(re.split("\r\n|\r|\n", data), 1) if line.strip()]
    stream = io.BufferedReader(io.BytesIO(data.encode()), buffer)
    rows = list(line_rows(stream, "p", "utf-8", Fields(Columns()).row))
    assert [row.prompt for row in rows] == [text for text, _ in values] and lines(rows) == numbers
    assert not stream.closed


def test_a_row_of_ten_megabytes(tmp_path: Path) -> None:
    long = "wörd " * 2_000_000
    data = (
        json.dumps({"prompt": "a"}).encode()
        + b"\n"
        + json.dumps({"prompt": long}, ensure_ascii=False).encode()
    )
    assert [row.prompt for row in read(tmp_path, data)] == ["a", long]
    file = parquet(tmp_path / "p.parquet", prompt=["a", long])
    assert [row.prompt for row in read_rows([file])] == ["a", long]


def taken(rows: Iterator[Row], count: int) -> int:
    """Peak of Python's memory while rows are taken."""
    tracemalloc.start()
    try:
        assert len(list(itertools.islice(rows, count))) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    data = b'{"prompt":"Once upon a time","id":5}\n' * 200_000  # 7 MB
    for name in ("p.jsonl", "p.jsonl.gz", "p.jsonl.zst"):
        (tmp_path / name).write_bytes(PACKED[name.removeprefix("p.jsonl")](data))
        assert taken(read_rows([tmp_path / name]), 10) < 10**6

    file = parquet(tmp_path / "p.parquet", prompt=["Once upon a time"] * 200_000, id=range(200_000))
    assert taken(read_rows([file]), 10) < 2 * 10**6
    datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")).save_to_disk(
        tmp_path / "set"
    )
    assert taken(read_rows([tmp_path / "set"]), 10) < 5 * 10**6


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt":"Once upon a time"}\n' * 20_000)
    tracemalloc.start()
    for row in read_rows([file]):
        assert row.error is None
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "data"),
    [("state.json", b"{"), ("state.json", b"{}"), ("data-00000-of-00001.arrow", b"x")],
)
def test_a_damaged_datasets_folder(tmp_path: Path, name: str, data: bytes) -> None:
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / name).write_bytes(data)
    with refused("Cannot read .*set: .* It may be damaged"):
        list(read_rows([tmp_path / "set"]))


@pytest.mark.parametrize(
    ("module", "name", "data", "says"),
    [
        ("pydantic", "p.jsonl", b'{"method":"POST","url":"/v1/completions","body":{}}', "midlogit.server"),
        ("pyarrow", "p.jsonl.zst", b"", "midlogit.batch"),
        ("pyarrow", "p.parquet", b"", "midlogit.batch"),
        ("datasets", "state.json", b"{}", "pip install datasets"),
    ],
)  # fmt: skip
def test_what_is_not_installed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, data: bytes, says: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MissingExtra, match=f"{module} is not installed.*{says}"):
        list(read_rows([tmp_path if module == "datasets" else tmp_path / name]))


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    script = (
        "import sys, midlogit.jobs.inputs; sys.exit(any(m in sys.modules for m in sys.argv[1:]))"
    )
    modules = ("datasets", "pyarrow", "pydantic", "torch", "transformers")
    assert subprocess.run([sys.executable, "-c", script, *modules]).returncode == 0
