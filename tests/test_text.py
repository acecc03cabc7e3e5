"""Text as it streams: whole characters, stop strings that never leak, whatever the tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from midlogit.sampling.text import LocalDetokenizer, TextStream
from tests.conftest import TEACHER

TOKENIZER = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))


def feed(ids: list[int], *stop: str) -> tuple[list[str], TextStream]:
    """The pieces released, the last at the end, and the stream."""
    stream = TextStream(LocalDetokenizer(TOKENIZER), [], stop)
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.stop_reason is not None:
            break
    return [*pieces, stream.finish()], stream


@settings(deadline=None)
@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    pieces, stream = feed(TOKENIZER.encode(text).ids)
    assert "".join(pieces) == text == stream.text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(5, 4095), max_size=30))
def test_any_ids_decode_as_they_do_at_once(ids: list[int]) -> None:
    pieces, stream = feed(ids)
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids)


@settings(deadline=None, max_examples=200)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_the_text_before_the_first(text: str, stops: list[str]) -> None:
    pieces, stream = feed(TOKENIZER.encode(text).ids, *stops)
    found = [text.find(stop) for stop in stops if stop in text]
    # A longer stop string may be met only after a shorter one has ended the text.
    assert "".join(pieces) == stream.text
    assert not any(stop in stream.text for stop in stops)
    assert bool(found) == (stream.stop_reason is not None)
    assert text.startswith(stream.text)
    if not found:
        assert stream.text == text


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = TOKENIZER.encode("a 😀 b").ids
    pieces, _ = feed(ids)
    assert len(ids) > 6 and "😀" in "".join(pieces)
    assert all(piece == "" or "😀" in piece or piece.isascii() for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    ids = TOKENIZER.encode("ok 😀").ids[:-1]
    pieces, stream = feed(ids)
    assert stream.text == "".join(pieces) == TOKENIZER.decode(ids)
    assert stream.text.startswith("ok ")


def test_what_may_begin_a_stop_string_is_held_and_then_released() -> None:
    ids = TOKENIZER.encode("one two").ids
    stream = TextStream(LocalDetokenizer(TOKENIZER), [], ("two three",))
    released = "".join(stream.push(i) for i in ids)
    assert released == "one "
    assert stream.finish() == "two" and stream.text == "one two"


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = TOKENIZER.encode("stop here stop").ids
    stream = TextStream(LocalDetokenizer(TOKENIZER), [], ("stop",))
    pieces = [stream.push(token_id, may_stop=number >= 3) for number, token_id in enumerate(ids)]
    assert "".join(pieces) == "stop here " and stream.stop_reason == "stop"


@pytest.mark.parametrize("skipped", ["<|end|>", "<|endoftext|>"])
def test_special_tokens_are_no_text(skipped: str) -> None:
    pieces, _ = feed([*TOKENIZER.encode("a b").ids, TOKENIZER.token_to_id(skipped)])
    assert "".join(pieces) == "a b"
