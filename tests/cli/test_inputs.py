"""Prompts from files and standard input: lines as an editor counts them, encodings, JSON lines."""

from __future__ import annotations

import gzip
import os
import sys
import threading
from pathlib import Path

import pyarrow
import pytest

from midlogit.cli.inputs import FIRST_ROWS, Input, as_they_come, rows_of_arguments
from midlogit.errors import InvalidRequest
from midlogit.jobs.inputs import Columns, Row


def read(
    folder: Path, data: bytes, name: str = "p.txt", encoding: str = "utf-8", **columns: str
) -> list[Row]:
    (folder / name).write_bytes(data)
    return list(Input(folder / name, encoding, Columns(**columns)))


def test_blank_lines_are_no_prompts_and_count(tmp_path: Path) -> None:
    rows = read(tmp_path, b"a\n\n  \r\nb \r\n\rc\x0bd\xe2\x80\xa8e\n\n")
    assert [(row.where.rpartition(", ")[2], row.prompt) for row in rows] == [
        ("line 1", "a"), ("line 4", "b "), ("line 6", "c\x0bd\u2028e"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"\xef\xbb\xbfcaf\xc3\xa9", "utf-8"),
        ("\ufeffcafé".encode("utf-16-le"), "utf-16"),
        ("\ufeffcafé".encode("utf-16-be"), "utf-16-be"),
        (b"caf\xe9", "latin-1"),
    ],
)
def test_encodings_and_byte_order_marks(tmp_path: Path, data: bytes, encoding: str) -> None:
    assert read(tmp_path, data, encoding=encoding)[0].prompt == "café"


@pytest.mark.parametrize(
    ("data", "encoding", "says"),
    [
        (
            b"a\r\n\r\ncaf\xe9 is open\nb",
            "utf-8",
            "p.txt, line 3: The byte 0xe9 is not UTF-8. .*--encoding latin-1",
        ),
        (
            b"\xff\xfea\0",
            "utf-8",
            "p.txt, line 1: this is UTF-16, not UTF-8. Use --encoding utf-16",
        ),
        (b"a", "utf-9", "--encoding is 'utf-9': unknown encoding"),
        (b"a", "hex", "--encoding is 'hex'"),
        (b"a", "undefined", "--encoding is 'undefined'"),
        (b"\n \n", "utf-8", "p.txt holds no prompt"),
    ],
)
def test_input_that_cannot_be_read(tmp_path: Path, data: bytes, encoding: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read(tmp_path, data, encoding=encoding)


@pytest.mark.parametrize(
    ("name", "says"), [("none", "No such file"), (".", "Is a directory"), ("a" * 999, "too long")]
)
def test_files_that_are_none(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Input(tmp_path / name, "utf-8", Columns())


def test_json_lines(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        b'\xef\xbb\xbf{"prompt": "a", "b": "B"}\n\n{"messages": [{"role": "user", "content": "hi"}], "b": null}\n'
        b'{"prompt": null, "messages": [5, 6]}\nnot json\n[1]\n{"text": "x"}\n{"prompt": 5}\n{"prompt": "\\ud800"}\n',
        "p.jsonl",
    )
    assert [row.where.rpartition(" ")[2] for row in rows] == [
        "1",
        "3",
        "4",
        "5",
        "6",
        "7",
        "8",
        "9",
    ]
    assert [row.prompt for row in rows] == [
        "a", [{"role": "user", "content": "hi"}], [5, 6], None, None, None, None, None,
    ]  # fmt: skip
    for row, says in zip(
        rows[3:],
        ("not JSON", "no JSON object", "columns are 'text'", "'prompt' is neither", "not JSON"),
        strict=True,
    ):
        assert row.error is not None and says in row.error


def test_columns_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"q": "a", "b": [5], "prompt": "no"}\n{"q": "c"}\n'
    named = read(tmp_path, data, "p.txt", prompt="q", base_prompt="b")
    with (tmp_path / "p.txt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        piped = list(Input(None, "utf-8", Columns("q", "b")))
    for rows in (named, piped):
        assert (rows[0].prompt, rows[0].base_prompt) == ("a", [5])
        assert rows[1].error == "It has no 'b'. Its columns are 'q'."


def test_arguments_that_are_no_text() -> None:
    rows = rows_of_arguments(["a", "caf\udce9"])
    assert rows[0] == Row("prompt 1", prompt="a")
    assert rows[1].prompt is None and "not UTF-8" in str(rows[1].error)


def test_compressed_files_and_named_pipes(tmp_path: Path) -> None:
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(b"a\nb\n"))
    with pyarrow.CompressedOutputStream(str(tmp_path / "p.jsonl.zst"), "zstd") as stream:
        stream.write(b'{"prompt":"a"}\n{"prompt":"b"}\n')
    for name in ("p.txt.gz", "p.jsonl.zst"):
        source = Input(tmp_path / name, "utf-8", Columns())
        assert source.count() == 2 and [row.prompt for row in source] == ["a", "b"]

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a\nb\n",))
    writer.start()
    assert [row.prompt for row in Input(tmp_path / "pipe", "utf-8", Columns())] == ["a", "b"]
    writer.join()


def test_bytes_of_another_encoding_far_into_a_file_are_an_error_of_their_row(
    tmp_path: Path,
) -> None:
    rows = read(tmp_path, b"a\n" * FIRST_ROWS + b"caf\xe9\nb\n")
    assert [row.prompt for row in rows[-3:]] == ["a", None, "b"]
    assert "The byte 0xe9 is not UTF-8" in str(rows[-2].error)


def test_rows_are_read_as_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row of a pipe comes when it is written, not when the pipe ends."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stdin, os.fdopen(write_end, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        source = Input(None, "utf-8", Columns())
        assert (source.blocks, source.can_repeat, source.count()) == (True, False, None)
        rows = as_they_come(iter(source))

        pipe.write(b"a\n")
        assert next(row for row in rows if row is not None).prompt == "a"
        assert next(rows) is None
        pipe.write(b"b\n")
        assert next(row for row in rows if row is not None).prompt == "b"

    (tmp_path / "p.txt").write_bytes(b"a\n\nb\n")
    source = Input(tmp_path / "p.txt", "utf-8", Columns())
    assert (source.blocks, source.can_repeat, source.count()) == (False, True, 2)
    assert list(source) == list(source)
