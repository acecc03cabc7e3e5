"""Opens a pair for the command line, quietly; knows which noise the libraries make."""

from __future__ import annotations

import sys

from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.pair import Pair


def quiet_transformers() -> None:
    """Keeps progress bars and advice of transformers off the terminal."""
    logging = require("transformers.utils.logging", "local")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def open_pair(
    base: str | None,
    teacher: str | None,
    *,
    device: str | tuple[str, str] = "auto",
    dtype: str = "auto",
    max_num_seqs: int = 16,
) -> Pair:
    """`Pair.local`, having said on a terminal what is being loaded."""
    if (base is None) != (teacher is None):
        missing = "--teacher" if teacher is None else "--base"
        raise InvalidRequest(f"{missing} is missing.", "Name both models, or neither for the bundled pair.")
    quiet_transformers()
    if sys.stderr.isatty():
        print(f"Loading {base or 'the bundled base'} and {teacher or 'teacher'} ...", file=sys.stderr)
    return Pair.local(base, teacher, device=device, dtype=dtype, max_num_seqs=max_num_seqs)
