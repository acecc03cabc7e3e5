"""Lines of files and streams, read one at a time; knows encodings and compression, no prompt.

Lines end at \\n, \\r\\n or \\r and are counted from 1, blank ones included; U+2028 and U+0085 do not end a line.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from midlogit.errors import InvalidRequest
from midlogit.extras import require

COMPRESSIONS = (".gz", ".zst")
UTF_8 = ("utf-8", "utf-8-sig")
BYTE_ORDER_MARK = "\ufeff"
WIDE_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # of UTF-16, as "surrogateescape" decodes them


class Line(NamedTuple):
    """A line that is not blank.

    Attributes:
        text: without its end. error: why its bytes are no text; None where they are.
    """

    number: int
    text: str
    error: str | None


def open_stream(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressed if its name ends in .gz or .zst.

    Raises:
        InvalidRequest: it cannot be opened. MissingExtra: .zst without pyarrow.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            return cast(BinaryIO, gzip.open(path))
        if suffix == ".zst":
            arrow = require("pyarrow", "batch")
            return cast(BinaryIO, arrow.CompressedInputStream(str(path), "zstd"))
        return path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror or error}.") from None


def check_encoding(encoding: str) -> None:
    """Refuses what is no encoding of text.

    Raises:
        InvalidRequest: says why.
    """
    try:
        "a".encode(encoding)
    except (LookupError, ValueError) as error:
        raise InvalidRequest(
            f"--encoding is {encoding!r}: {error}.", "Use a text encoding, such as latin-1."
        ) from None


def read_lines(stream: BinaryIO, name: str, encoding: str) -> Generator[Line, None, None]:
    """The lines of a stream that are not blank, read as they are asked for; the stream stays open.

    Bytes that are not text in the encoding make an error of their line alone, or of the file where its lines cannot be
    told apart: UTF-16 and UTF-32.

    Args:
        name: named in errors. encoding: one that `check_encoding` takes.

    Raises:
        InvalidRequest: the stream cannot be read or decompressed to its end, or is UTF-16 by its mark.
    """
    text = io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="")
    number = 0
    try:
        for number, line in enumerate(text, 1):
            if number == 1:
                line = _without_mark(line, name, encoding)
            if line.strip():
                line = line.rstrip("\r\n")
                yield Line(number, line, _fault(line, encoding))
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{name}, line {number + 1}: it is not {encoding.upper()}: {error.reason}.",
            "Name what it is, such as --encoding latin-1.",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(
            f"Cannot read {name} beyond line {number}: {why}.", "It may be cut off or damaged."
        ) from None
    finally:
        text.detach()


def _without_mark(line: str, name: str, encoding: str) -> str:
    """The first line without a byte order mark."""
    if codecs.lookup(encoding).name in UTF_8 and line.startswith(WIDE_MARKS):
        raise InvalidRequest(
            f"{name}, line 1: this is UTF-16, not UTF-8.", "Use --encoding utf-16."
        )
    return line.removeprefix(BYTE_ORDER_MARK)


def _fault(line: str, encoding: str) -> str | None:
    """The first byte of a line that is not text, if there is one."""
    if line.isascii():
        return None
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        hint = f"Save it as {encoding.upper()}, or name what it is, such as --encoding latin-1."
        return f"The byte 0x{byte:02x} is not {encoding.upper()}. {hint}"
    return None
