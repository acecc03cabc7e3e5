"""Token ids to the pieces of a text, by the teacher's tokenizer where it is at hand; opens no model and no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midlogit.errors import InvalidRequest
from midlogit.jobs.manifest import Manifest
from midlogit.models.detokenize import Detokenizer, LocalDetokenizer

FILE = "tokenizer.json"


class TokenTexts:
    """The texts of tokens; None for what is not known without a tokenizer.

    Args:
        detokenizer: of the teacher; None where it is not at hand.
    """

    def __init__(self, detokenizer: Detokenizer | None) -> None:
        self._detokenizer = detokenizer

    @property
    def is_known(self) -> bool:
        return self._detokenizer is not None

    def name(self, token_id: int) -> str:
        """The text of a token inside a text, else its number."""
        if self._detokenizer is None:
            return f"#{token_id}"
        return str(self._detokenizer.token(token_id))

    def pieces(self, ids: Sequence[int], text: str) -> list[str] | None:
        """What each id adds to a completion, so that all together are its text; None if the ids do not spell it."""
        if self._detokenizer is None:
            return None
        decoding = self._detokenizer.decoding((), live=True)
        found = [decoding.step(token_id) for token_id in ids]
        if found:
            found[-1] += decoding.rest()
        whole = "".join(found)
        if whole.startswith(text):  # a stop string is no part of the text
            return _first_characters(found, len(text))
        if whole.lstrip() == text.lstrip():  # a space that the beginning of a text drops or keeps
            return found
        return None


def token_texts(manifest: Manifest | None, tokenizer: str | Path | None) -> TokenTexts:
    """The tokenizer that is named, else that of the job's teacher if it lies on this machine.

    Args:
        tokenizer: a folder with a tokenizer.json, or a hub id that was loaded before.

    Raises:
        InvalidRequest: there is no tokenizer where one is named.
    """
    if tokenizer is not None:
        path = _file(str(tokenizer))
        if path is None:
            raise InvalidRequest(
                f"{tokenizer} holds no {FILE}.",
                "Name the teacher's folder, or a hub id in the cache.",
            )
    else:
        path = _file(manifest.teacher) if manifest is not None and manifest.teacher else None
    return TokenTexts(None if path is None else _opened(path))


def _opened(path: Path) -> LocalDetokenizer:
    from tokenizers import Tokenizer

    opened: Any = Tokenizer.from_file(str(path))
    return LocalDetokenizer(opened)


def _file(name: str) -> Path | None:
    folder = Path(name)
    if (folder / FILE).is_file():
        return folder / FILE
    if folder.exists() or name.count("/") != 1 or name.startswith("/"):
        return None

    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, FILE)
    return Path(found) if isinstance(found, str) else None


def _first_characters(pieces: list[str], count: int) -> list[str]:
    kept = []
    for piece in pieces:
        kept.append(piece[:count])
        count -= len(kept[-1])
    return kept
