"""Text as it streams: whole characters, stop strings that never leak, whatever the tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import takewhile
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from midlogit import Pair, SamplingParams
from midlogit.engines.http.served import ServedDetokenizer
from midlogit.models.detokenize import LocalDetokenizer, TextStream
from midlogit.server.vocabulary import Offsets
from tests.conftest import TEACHER
from tests.variants import metaspace, sentencepiece

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
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
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


@pytest.mark.parametrize("wait", range(8))
def test_a_stop_string_counts_if_it_ends_after_min_tokens(wait: int) -> None:
    ids = TOKENIZER.encode("a girl named Ann, a girl named Sue").ids
    stream = TextStream(LocalDetokenizer(TOKENIZER), [], ("girl named", "l na"))
    named = [n for n, i in enumerate(ids) if TOKENIZER.decode([i]).startswith(" nam")]
    pieces = []
    for number, token_id in enumerate(ids):
        pieces.append(stream.push(token_id, may_stop=number >= wait))
        if stream.stop_reason is not None:
            break
    met = next(n for n in named if n >= wait)
    assert number == met and stream.stop_reason == "l na"
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids[:met])[:-1]


def test_a_stop_string_wholly_before_min_tokens_is_text_where_a_longer_one_may_have_begun() -> None:
    ids = TOKENIZER.encode("x stop y").ids
    stream = TextStream(LocalDetokenizer(TOKENIZER), [], ("stop", "x stop z"))
    pieces = [
        stream.push(token_id, may_stop=number >= len(ids) - 1)
        for number, token_id in enumerate(ids)
    ]
    assert "".join([*pieces, stream.finish()]) == "x stop y" and stream.stop_reason is None


@pytest.mark.parametrize("kind", ["byte-fallback"])
def test_byte_pieces_before_min_tokens_are_no_stop(kind: Kind) -> None:
    ids = tokenizer(kind).encode("one\ntwo").ids
    newline = ids.index(tokenizer(kind).token_to_id("<0x0A>"))
    stream = TextStream(detokenizer(kind), [], ("\n",))
    pieces = [
        stream.push(token_id, may_stop=number > newline) for number, token_id in enumerate(ids)
    ]
    assert "".join([*pieces, stream.finish()]) == "one\ntwo"


Kind = Literal["byte-level", "byte-fallback", "metaspace"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLIT = "x 🦊é\ufffd你\n"


@cache
def tokenizer(kind: Kind) -> Tokenizer:
    data = json.loads((TEACHER / "tokenizer.json").read_text())
    change = {"byte-level": dict, "byte-fallback": sentencepiece, "metaspace": metaspace}[kind]
    return Tokenizer.from_str(json.dumps(change(data)))


@cache
def detokenizer(kind: Kind) -> LocalDetokenizer:
    return LocalDetokenizer(tokenizer(kind))


def drawn(kind: Kind, most: int) -> st.SearchStrategy[list[int]]:
    """Ids of which every second is a part of a character."""
    parts = tokenizer(kind).encode(SPLIT, add_special_tokens=False).ids
    wrong = [i for i in range(5, 4096) if "\ufffd" in tokenizer(kind).decode([i])]
    return st.lists(st.sampled_from([*parts, *wrong[::20]]) | st.integers(5, 4095), max_size=most)


def read(kind: Kind, prompt: list[int], ids: list[int], live: bool) -> list[str]:
    """The pieces of a completion, the last at the end."""
    stream = TextStream(detokenizer(kind), prompt, (), live)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == stream.text
    return pieces


def without_run(kind: Kind, prompt: list[int]) -> list[int]:
    """A prompt without the whole characters that it has last in byte pieces."""
    names = [tokenizer(kind).id_to_token(i) for i in prompt]
    run = list(takewhile(lambda name: name.startswith("<0x"), reversed(names)))[::-1]
    data = bytes(int(name[3:5], 16) for name in run)
    for unfinished in range(4):
        with suppress(UnicodeDecodeError):
            whole = len(data) - unfinished
            data[: max(whole, 0)].decode()
            return prompt[: len(prompt) - len(run)] + prompt[len(prompt) - unfinished :]
    return prompt


def law(kind: Kind, prompt: list[int], ids: list[int]) -> str:
    """What the ids add to the text of the prompt, by decoding all at once."""
    before, whole = tokenizer(kind).decode(prompt), tokenizer(kind).decode(prompt + ids)
    if (
        not whole.startswith(before) and kind == "byte-fallback"
    ):  # a wrong byte, or the end of a character
        prompt = without_run(kind, prompt)
        before, whole = tokenizer(kind).decode(prompt), tokenizer(kind).decode(prompt + ids)
    common = next(
        (n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before)
    )
    return whole[common:]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_text_is_what_the_ids_add_to_the_prompt(kind: Kind, data: st.DataObject) -> None:
    prompt, ids = data.draw(drawn(kind, 8)), data.draw(drawn(kind, 12))
    pieces = read(kind, prompt, ids, live=True)
    text = "".join(pieces)
    assert text == law(kind, prompt, ids)
    assert read(kind, prompt, ids, live=False)[-1] == text


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=120)
@given(st.data())
def test_tokens_and_offsets_agree_with_the_text(kind: Kind, data: st.DataObject) -> None:
    prompt, ids = data.draw(drawn(kind, 8)), data.draw(drawn(kind, 12))
    text = "".join(read(kind, prompt, ids, live=True))
    offsets = Offsets(detokenizer(kind), prompt, 0)
    check_offsets(kind, prompt, ids, text, [offsets.next(i) for i in ids])
    # With an echo, of prompt and completion together.
    every = LocalDetokenizer(tokenizer(kind), special=True)
    offsets = Offsets(every, (), 0)
    check_offsets(
        kind,
        [],
        prompt + ids,
        tokenizer(kind).decode(prompt + ids),
        [offsets.next(i) for i in prompt + ids],
    )


def check_offsets(
    kind: Kind, prompt: list[int], ids: list[int], text: str, offsets: list[int]
) -> None:
    assert offsets == sorted(offsets) and (not ids or 0 <= offsets[0] <= offsets[-1] <= len(text))
    for position, (token_id, offset) in enumerate(zip(ids, offsets, strict=True)):
        name = detokenizer(kind).token(token_id)
        if not prompt and not position:
            name = name.removeprefix(" ") if kind != "byte-level" else name
        if "\ufffd" in name:
            continue
        shown = text[offset : offset + len(name)]
        # A byte piece is a character, or no text together with those around it.
        assert shown == name or (detokenizer(kind).is_byte(token_id) and shown == "\ufffd")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_join_to_the_text(kind: Kind) -> None:
    text = "Tom and  Ann, aged 7,\n\tlike theatre. "
    names = [detokenizer(kind).token(i) for i in tokenizer(kind).encode(text).ids]
    assert "".join(names) == {"byte-level": text, "byte-fallback": f" {text}"}.get(
        kind, f" {text}".replace("\n\t", "")
    )


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_belongs_to_the_id_that_completes_it(kind: Kind) -> None:
    ids = tokenizer(kind).encode("I like 🦊 and you").ids
    fox = (
        next(n for n in range(len(ids)) if tokenizer(kind).decode(ids[: n + 1]).endswith("🦊")) + 1
    )
    assert "".join(read(kind, ids[:fox], ids[fox:], live=True)) == " and you"
    for missing in (1, 2, 3):
        prompt = ids[: fox - missing]
        assert "".join(read(kind, prompt, ids[fox - missing :], live=True)) == "🦊 and you"
        assert "".join(read(kind, prompt, ids[fox:], live=True)) == " and you"
        # What extends an unfinished character is a part of the U+FFFD that byte-level vocabularies show for it.
        further = "".join(read(kind, prompt, ids[fox - missing : fox - 1], live=True))
        assert further == ("" if kind == "byte-level" else "\ufffd" * (missing - 1))


def test_bytes_that_are_no_text_leave_the_prompt_as_it_is() -> None:
    """A run of byte pieces with a wrong one is no text at all, also where the prompt has shown its beginning."""
    ids = tokenizer("byte-fallback").encode("I like 🦊").ids
    wrong = tokenizer("byte-fallback").token_to_id("<0xFF>")
    assert tokenizer("byte-fallback").decode([*ids, wrong]) == "I like " + "\ufffd" * 5
    assert read("byte-fallback", ids, [wrong], live=True) == ["", "\ufffd"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_character_of_the_prompt_is_the_prompts(kind: Kind) -> None:
    prompt, ids = (
        tokenizer(kind).encode(text).ids for text in ("The caf\ufffd", "The caf\ufffd The fox")
    )
    assert "".join(read(kind, prompt, ids[len(prompt) :], live=True)) == " The fox"


def test_a_stop_string_in_byte_pieces_is_met_at_once() -> None:
    """Although the text of a run of byte pieces is settled only after it."""
    ids = tokenizer("byte-fallback").encode("one\n\ntwo").ids
    stream = TextStream(detokenizer("byte-fallback"), [], ("\n",))
    pieces = []
    while stream.stop_reason is None:
        pieces.append(stream.push(ids[len(pieces)]))
    assert tokenizer("byte-fallback").id_to_token(ids[len(pieces) - 1]) == "<0x0A>"
    assert "".join(pieces) == stream.text == "one" and stream.finish() == ""


def test_long_wrong_bytes_cost_no_more_per_token() -> None:
    for kind, piece in (
        ("byte-level", "ÿ"),
        ("byte-fallback", "<0xFF>"),
        ("byte-fallback", "<0x0A>"),
    ):
        wrong = tokenizer(kind).token_to_id(piece)
        ids = [*[wrong] * 300, *tokenizer(kind).encode("a b").ids]
        detokenizer_ = Counting(tokenizer(kind))
        stream = TextStream(detokenizer_, [], ("stop",))
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer(kind).decode(ids)
        assert detokenizer_.decoded < 40 * len(ids)


class Counting(LocalDetokenizer):
    """Counts the ids that are decoded."""

    decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_decodes_gives_the_same_text(kind: Kind) -> None:
    local = detokenizer(kind)
    served = ServedDetokenizer(
        lambda text: tokenizer(kind).encode(text).ids, local.decode, frozenset(range(5)), [1]
    )
    assert [served.is_byte(i) for i in range(4096)] == [local.is_byte(i) for i in range(4096)]
    assert [served.token(i) for i in range(5, 4096)] == [local.token(i) for i in range(5, 4096)]
    ids = tokenizer(kind).encode(SPLIT * 2).ids
    for start in range(len(ids)):
        for live in (True, False):
            stream = TextStream(served, ids[:start], (), live)
            pieces = [*map(stream.push, ids[start:]), stream.finish()]
            assert "".join(pieces) == "".join(read(kind, ids[:start], ids[start:], live=True))


def test_a_completion_holds_no_text_of_the_prompt(pair: Pair) -> None:
    ids = TOKENIZER.encode("I like 🦊").ids
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts = [*(ids[: len(ids) - missing] for missing in range(4)), "The caf\ufffd"]
    for prompt, completion in zip(
        prompts, pair.generate(prompts, params, progress=False), strict=True
    ):
        prompt_ids = TOKENIZER.encode(prompt).ids if isinstance(prompt, str) else prompt
        text = TOKENIZER.decode(prompt_ids + completion.token_ids).removeprefix(
            TOKENIZER.decode(prompt_ids)
        )
        assert completion.text == text and "like" not in text
        *tokens, streamed = pair.stream(prompt, params)
        assert "".join(token.text for token in tokens) == streamed.text == text
