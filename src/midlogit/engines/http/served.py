"""A model whose tokenizer is on a server, in the form in which the rest of midlogit knows models.

Knows what the handshake found and the /tokenize and /detokenize endpoints; samples nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from midlogit.engines.http.client import CallFailed, Client, Endpoint
from midlogit.engines.http.tokenizing import read_ids, read_text
from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.messages import Message
from midlogit.models.checkpoint import plain_chat
from midlogit.models.detokenize import REPLACEMENT, Detokenizer
from midlogit.models.tokenization import ids_before, undoubled

MAX_DECODED = 100_000  # decoded pieces that are cached
RARE = "\U0010fffd"  # a character in no vocabulary: it is encoded as bytes, if at all


@dataclass(frozen=True)
class ServedModel:
    """A model without files on this machine.

    Its calls wait for the server, so they must not be made in the client's loop.
    """

    client: Client
    server: Endpoint
    name: str
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]
    logit_size: int
    max_context: int
    has_chat_template: bool
    detokenizer: ServedDetokenizer = field(init=False)

    def __post_init__(self) -> None:
        detokenizer = ServedDetokenizer(self.encode, self._decode, self.special_ids, self.stop_ids)
        object.__setattr__(self, "detokenizer", detokenizer)

    @property
    def vocabulary(self) -> dict[int, str] | None:
        return None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, most: int | None = None
    ) -> list[int]:
        """Ids by the server's tokenizer, as `Checkpoint.encode`; `most` is not used: the server limits requests."""
        ids = self._ids(text, add_special_tokens)
        return undoubled(ids, self._ids_before) if add_special_tokens else ids

    def encode_chat(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None,
        *, most: int | None = None,
    ) -> list[int]:  # fmt: skip
        if not self.has_chat_template:
            return self.encode(plain_chat(messages))
        body: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True}
        if variables:
            body["chat_template_kwargs"] = dict(variables)
        try:
            return self._tokens(body)
        except EngineFailure as error:
            raise InvalidRequest(
                f"The {self.server.name} refuses the messages: {error.args[0]}"
            ) from error

    @cached_property
    def _ids_before(self) -> list[int]:
        return ids_before(self._ids)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokens({"prompt": text, "add_special_tokens": add_special_tokens})

    def _tokens(self, body: dict[str, Any]) -> list[int]:
        return list(self._call("//tokenize", body, read_ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._call("//detokenize", {"tokens": list(ids)}, read_text)) if ids else ""

    def _call(self, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        try:
            return self.client.run(
                self.client.call(self.server, path, {"model": self.name, **body}, read)
            )
        except CallFailed as failure:
            raise EngineFailure(f"{self.server.name}: {failure.message}") from failure


class ServedDetokenizer(Detokenizer):
    """Text by /detokenize: all at the end where it is not streamed, else piece by piece."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        special_ids: frozenset[int],
        stop_ids: Sequence[int],
    ) -> None:
        super().__init__()
        self._hidden = special_ids | set(stop_ids)
        self._encode = encode
        self._decode = lru_cache(maxsize=MAX_DECODED)(decode)

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(tuple(ids))

    def shows(self, token_id: int) -> bool:
        return token_id not in self._hidden

    def is_byte(self, token_id: int) -> bool:
        """Whether a wrong byte after the token changes its text, as in a run of byte pieces."""
        if self._wrong_byte is None:
            return False
        alone = self.first(token_id)
        return alone == REPLACEMENT or not self.decode((token_id, self._wrong_byte)).startswith(
            alone
        )

    @cached_property
    def _wrong_byte(self) -> int | None:
        """A byte piece that begins no character; None where such pieces leave the text before them as it is."""
        ids = [i for i in self._encode(RARE) if self.shows(i)]
        if not ids or self.first(ids[-1]) != REPLACEMENT:
            return None
        return None if self.decode([*ids, ids[-1]]).endswith(RARE + REPLACEMENT) else ids[-1]
