"""Rows on a pipe are whole when the command that writes them is killed."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

ROWS = """
from midlogit.cli.console import set_up_streams, write_json_line, write_text

set_up_streams()
while True:
    write_json_line({row!r})
    write_text({row!r}.decode() + "\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Windows have no such rule")
@pytest.mark.parametrize("size", [200, select.PIPE_BUF - 1] if sys.platform != "win32" else [])
def test_rows_up_to_a_page_are_whole_after_a_kill(size: int) -> None:
    code = ROWS.format(row=b"x" * size)
    for pieces in (40, 90):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            read = [os.read(child.stdout.fileno(), 3000) for _ in range(pieces)]
            child.kill()
            rest = child.stdout.read()
        assert {len(line) for line in b"".join([*read, rest]).splitlines(True)} == {size + 1}
