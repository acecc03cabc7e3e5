"""What is written is whole: lines and files on a full disk, and no module that writes in another way."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
from pathlib import Path

import orjson
import pytest

import midlogit
from midlogit import lines
from midlogit.jobs.files import write_whole
from midlogit.server.logs import LineFormatter, LineHandler

WRITES = re.compile(r"\.write_(text|bytes)\(|O_WRONLY|open\([^)]*['\"][wax]b?['\"]")
# Drafts that are renamed, heartbeats, and what is written through `lines`.
WRITERS = {
    "cli/console.py",
    "jobs/attempts.py",
    "jobs/claims.py",
    "jobs/exports/writing.py",
    "jobs/files.py",
    "jobs/journal.py",
    "jobs/plan.py",
}


def test_no_other_module_opens_files_to_write() -> None:
    package = Path(midlogit.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if WRITES.search(re.sub(r'""".*?"""', "", path.read_text(), flags=re.S))
    }
    assert found <= WRITERS


def test_lines_on_a_full_disk_are_whole(small_disk: Path) -> None:
    path = small_disk / "log.jsonl"
    line = b"x" * 30_000 + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(10):
            lines.append(descriptor, line)
    kept = path.stat().st_size // len(line)
    assert kept > 1 and path.read_bytes() == line * kept

    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    lines.append(descriptor, line)
    os.close(descriptor)
    assert path.read_bytes() == line * (kept + 1)


def test_the_log_of_a_server_on_a_full_disk_stays_json(small_disk: Path) -> None:
    path = small_disk / "log.jsonl"
    with path.open("w") as stream:
        handler = LineHandler(stream)
        handler.setFormatter(LineFormatter(True, lambda text: text))
        for number in range(100):
            handler.emit(logging.LogRecord("a", 20, "", 0, f"{number} " + "é" * 5000, None, None))
    logged = [orjson.loads(line) for line in path.read_bytes().splitlines(keepends=True)]
    assert 10 < len(logged) < 100 and path.read_bytes().endswith(b"\n")
    assert [line["message"].split()[0] for line in logged] == list(map(str, range(len(logged))))


def test_a_file_on_a_full_disk_is_the_old_one_or_none(small_disk: Path) -> None:
    old, new = small_disk / "old.html", small_disk / "new.html"
    write_whole(old, b"old")
    for path in (old, new):
        with pytest.raises(OSError, match=r"No space left") as caught:
            write_whole(path, b"x" * 300_000)
        assert caught.value.filename == str(path)
    assert [path.name for path in small_disk.iterdir()] == ["old.html"]
    assert old.read_bytes() == b"old"


def test_a_file_is_replaced_where_it_is(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    write_whole(Path("/dev/null"), b"new")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "none" / "file", b"")
    assert caught.value.errno == errno.ENOENT and not (tmp_path / "none").exists()
