"""Opens a pair for the command line, quietly; knows which noise the libraries make, and URLs from folders."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.pair import Pair


@dataclass(frozen=True, slots=True)
class Serving:
    """What the command line says of two servers; `top_k` is a number or "auto"."""

    top_k: str = "20"
    base_model: str | None = None
    teacher_model: str | None = None
    base_tokenizer: str | None = None
    teacher_tokenizer: str | None = None
    base_api_key: str | None = field(default=None, repr=False)
    teacher_api_key: str | None = field(default=None, repr=False)

    def options(self) -> dict[str, Any]:
        """As `Pair.http` takes them."""
        names = (
            "base_model",
            "teacher_model",
            "base_tokenizer",
            "teacher_tokenizer",
            "base_api_key",
            "teacher_api_key",
        )
        try:
            top_k: int | str = self.top_k if self.top_k == "auto" else int(self.top_k)
        except ValueError:
            raise InvalidRequest(f"--top-k is {self.top_k!r}.", "Give a number or auto.") from None
        return {"top_k": top_k, **{name: getattr(self, name) for name in names}}


def are_urls(base: str | None, teacher: str | None) -> bool:
    """Whether servers are meant.

    Raises:
        InvalidRequest: one server and one folder, or only one of the two.
    """
    if (base is None) != (teacher is None):
        missing = "--teacher" if teacher is None else "--base"
        raise InvalidRequest(f"{missing} is missing.", "Name both models, or neither for the bundled pair.")
    urls = [name is not None and name.startswith(("http://", "https://")) for name in (base, teacher)]
    if any(urls) and not all(urls):
        raise InvalidRequest("One model is a server and one a folder.", "Name two servers or two folders.")
    return all(urls)


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
    serving: Serving | None = None,
) -> Pair:
    """`Pair.http` for URLs (several a side parted by commas), else `Pair.local`, said on a terminal."""
    if are_urls(base, teacher) and base and teacher:
        if find_spec("transformers") is not None:
            quiet_transformers()
        return Pair.http(base.split(","), teacher.split(","), **(serving or Serving()).options())
    quiet_transformers()
    if sys.stderr.isatty():
        print(f"Loading {base or 'the bundled base'} and {teacher or 'teacher'} ...", file=sys.stderr)
    return Pair.local(base, teacher, device=device, dtype=dtype, max_num_seqs=max_num_seqs)
