"""Prompts as users give them: contents, arrays of ids, BOS, template options, bounds on length; one reading for all."""

from __future__ import annotations

import array
import asyncio
import json
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from midlogit import InvalidRequest, Pair, PromptTooLong, SamplingParams
from midlogit.cli.doctor import run_doctor
from midlogit.cli.loading import PairOptions, parse_template_kwargs
from midlogit.engines.http.served import ServedModel
from midlogit.errors import InvalidField
from midlogit.messages import of_each_side, plain_messages, template_variables
from midlogit.models.tokenization import Density
from midlogit.requests.prompts import Reading
from tests.commands import run
from tests.conftest import BASE, TEACHER
from tests.variants import open_folders, with_bos, with_named_templates, with_thinking

GREEDY = SamplingParams(max_tokens=4, temperature=0)
USER = {"role": "user", "content": "Hi there"}


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": "Hi there"}]},
        {
            "content": [
                {"type": "text", "text": "Hi "},
                None,
                {"text": "there"},
                {"type": "text", "text": None},
            ]
        },
        {
            "content": (
                "Hi ",
                {"type": "input_text", "text": "there", "cache_control": {"type": "ephemeral"}},
            )
        },
        {"type": "text"},
        {
            "tool_calls": [],
            "function_call": None,
            "refusal": None,
            "audio": None,
            "reasoning_content": "",
        },
        {"name": None, "annotations": [], "id": "msg_1"},
        {"made_up": None},
    ],
    ids=str,
)
def test_what_asks_for_nothing_passes(message: dict[str, Any]) -> None:
    assert plain_messages([USER | message], "prompt") == [USER]


@pytest.mark.parametrize(
    ("message", "field", "unsupported"),
    [
        ({"tool_calls": [{"id": "1"}]}, "tool_calls", True),
        ({"function_call": {"name": "f"}}, "function_call", True),
        ({"refusal": "No."}, "refusal", True),
        ({"made_up": 1}, "made_up", True),
        ({"role": "tool"}, "role", True),
        ({"role": "wizard"}, "role", False),
        ({"role": ["user"]}, "role", False),
        ({"name": 5}, "name", False),
        ({"content": 5}, "content", False),
        ({"content": {"text": "Hi"}}, "content", False),
        ({"content": ["a", 5]}, "content.1", False),
        ({"content": "caf\udce9"}, "content", False),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content.0.type", False),
        ({"content": [{"type": "text"}]}, "content.0.text", False),
        ({"content": [{"type": "text", "text": 5}]}, "content.0.text", False),
        (
            {"content": ["a", {"type": "text", "text": "b", "made_up": 1}]},
            "content.1.made_up",
            True,
        ),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_named(
    message: dict[str, Any], field: str, unsupported: bool
) -> None:
    with pytest.raises(InvalidField) as caught:
        plain_messages([USER, USER | message], "base prompt 0")
    assert (caught.value.field, caught.value.unsupported) == (field, unsupported)
    assert "message 1 of the base prompt 0" in str(caught.value).lower()
    assert pickle.loads(pickle.dumps(caught.value)).field == field


def test_roles_and_empty_contents() -> None:
    contents: tuple[Any, ...] = (None, "", [], [None])
    assert {
        m["content"]
        for m in plain_messages([{"role": "user", "content": c} for c in contents], "x")
    } == {""}
    assert plain_messages([{"role": "developer", "content": "a", "name": "b"}], "x") == [
        {"role": "system", "content": "a", "name": "b"}
    ]


def test_parts_through_python(pair: Pair) -> None:
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}],
        }
    ]
    found, plain = pair.generate([parts, [USER]], GREEDY)
    assert (found.usage, found.text) == (plain.usage, plain.text)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for call in (pair.generate, pair.score, pair.as_completed):
        with pytest.raises(
            InvalidRequest, match="Part 0 of message 0 of the base prompt 0 is of type 'image_url'"
        ):
            call([image])
    with pytest.raises(InvalidRequest, match="lone surrogates"):
        pair.generate(["caf\udce9"])


@pytest.mark.parametrize(
    "convert",
    [
        np.array,
        torch.tensor,
        tuple,
        lambda ids: array.array("l", ids),
        lambda ids: list(np.array(ids, dtype=np.uint16)),
        lambda ids: [torch.tensor(i) for i in ids],
    ],
)
def test_ids_of_any_kind(pair: Pair, convert: Any) -> None:
    ids = pair.mixing.teacher.encode("Once upon a time")
    expected = pair.generate([ids], GREEDY)[0]
    given = convert(ids)
    found = pair.generate([given], GREEDY)[0]
    assert found.token_ids == expected.token_ids
    assert json.loads(json.dumps(found.to_dict()))["prompt"] == ids
    own = pair.generate(base_prompts=[given], teacher_prompts=[ids], params=GREEDY)[0]
    streamed = list(pair.stream(given, GREEDY))[-1]
    assert own.token_ids == streamed.token_ids == expected.token_ids  # type: ignore[union-attr]
    assert list(pair.score([given])[0].token_ids) == ids


def test_a_matrix_is_as_many_prompts(pair: Pair) -> None:
    assert [c.prompt for c in pair.generate(np.array([[5, 6], [7, 8]]), GREEDY)] == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    "prompt",
    [
        np.array([True]),
        [True],
        np.array([1.0]),
        np.array(3),
        np.array([[1]]),
        b"abc",
        torch.tensor([0.5]),
        3,
    ],
)
def test_what_is_no_ids(pair: Pair, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="no known form"):
        pair.generate([prompt])


@pytest.fixture(scope="module")
def bos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with open_folders(with_bos(tmp_path_factory.mktemp("bos") / "pair")) as opened:
        yield opened


def test_a_text_that_carries_bos_has_it_once(bos: Pair) -> None:
    for model in (bos.mixing.base, bos.mixing.teacher):
        plain, with_it = model.encode("Once"), model.encode("<s>Once")
        assert plain == with_it == model.encode("<s>Once", add_special_tokens=False)
        assert (plain[0], plain[1:]) == (2, model.encode("Once", add_special_tokens=False))
        # Who writes two wants two.
        assert model.encode("<s><s>Once") == [2, *plain]
    templated = bos.mixing.teacher.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [USER], add_generation_prompt=True, tokenize=False
    )
    assert bos.generate([templated], GREEDY)[0].usage.prompt_tokens == len(
        bos.mixing.teacher.encode_chat([USER])
    )
    params = SamplingParams.preset("exploratory")
    scored = [bos.score([text], params)[0] for text in ("Once upon a time", "<s>Once upon a time")]
    assert scored[0].token_ids == scored[1].token_ids
    assert np.isfinite(scored[1].diagnostics.logprobs).all()


def test_special_tokens_can_be_left_out(bos: Pair) -> None:
    options: dict[str, Any] = {"add_special_tokens": False}
    usual = bos.generate(["Once upon"], GREEDY)[0].usage
    assert (
        bos.generate(["Once upon"], GREEDY, **options)[0].usage.prompt_tokens
        == usual.prompt_tokens - 1
    )
    assert (
        list(bos.stream("Once upon", GREEDY, **options))[-1].usage.prompt_tokens
        == usual.prompt_tokens - 1
    )  # type: ignore[union-attr]
    assert len(bos.score(["Once upon"], **options)[0].token_ids) == usual.prompt_tokens - 1
    # Templates bring their own, or not: nothing is added to them, and nothing taken.
    chats = [bos.generate(["Hi"], GREEDY, chat=True, **some)[0].usage for some in ({}, options)]
    assert chats[0].prompt_tokens == chats[1].prompt_tokens


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = with_thinking(tmp_path_factory.mktemp("thinking") / "pair", ("base", "teacher"))
    with open_folders(folder) as opened:
        yield opened


OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("variables", "off"),
    [
        (None, (False, False)),
        ({}, (False, False)),
        ({"enable_thinking": None}, (False, False)),
        ({"enable_thinking": True, "add_generation_prompt": True}, (False, False)),
        (OFF, (True, True)),
        ((OFF, None), (True, False)),
        ((None, OFF), (False, True)),
    ],
    ids=str,
)
def test_template_variables_reach_each_side(
    thinking: Pair, variables: Any, off: tuple[bool, bool]
) -> None:
    added = len(thinking.mixing.teacher.encode("<think></think>"))
    plain = len(thinking.mixing.teacher.encode_chat([USER]))
    call: dict[str, Any] = {"params": GREEDY, "chat_template_kwargs": variables}
    expected = tuple(plain + added * side for side in off)

    def sizes(completion: Any) -> tuple[int, int]:
        return completion.usage.base_prompt_tokens, completion.usage.prompt_tokens

    assert sizes(thinking.generate([[USER]], **call)[0]) == expected
    assert sizes(thinking.generate(["Hi there"], chat=True, **call)[0]) == expected
    assert sizes(next(thinking.as_completed([[USER]], **call))) == expected
    assert sizes(list(thinking.stream([USER], **call))[-1]) == expected
    scored = thinking.score([[USER]], **call)[0]
    assert (len(scored.base_token_ids), len(scored.token_ids)) == expected

    async def asynchronously() -> None:
        assert sizes((await thinking.agenerate([[USER]], **call))[0]) == expected
        assert sizes([event async for event in thinking.astream([USER], **call)][-1]) == expected

    asyncio.run(asynchronously())


def test_template_variables_that_cannot_be_honoured(thinking: Pair) -> None:
    for variables in ({"chat_template": "x"}, {"tokenize": True}, {"add_generation_prompt": False}):
        with pytest.raises(InvalidField, match="cannot honour") as caught:
            template_variables(variables)
        assert caught.value.field == next(iter(variables))
    for wrong in ([("a", 1)], "enable_thinking", {1: 2}):
        with pytest.raises(InvalidRequest, match="map names to values"):
            of_each_side(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="no pair"):
        of_each_side((OFF,))  # type: ignore[arg-type]
    before = thinking.statistics()
    for variables in (OFF, (None, OFF)):
        with pytest.raises(InvalidRequest, match="no prompt is a chat"):
            thinking.generate(
                base_prompts=["a"], teacher_prompts=["a"], chat_template_kwargs=variables
            )
    with pytest.raises(InvalidRequest, match="no prompt is a chat"):
        thinking.generate(
            base_prompts=[[USER]], teacher_prompts=["a"], chat_template_kwargs=(None, OFF)
        )
    assert thinking.statistics() == before
    assert thinking.generate(
        base_prompts=[[USER]], teacher_prompts=["a"], params=GREEDY, chat_template_kwargs=OFF
    )


def test_named_templates_are_chosen_for_each_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_named_templates(tmp_path / "pair", "chat", "rag")
    with open_folders(folder) as opened:
        assert opened.generate(["Hi"], GREEDY)[0].text
        with pytest.raises(
            InvalidRequest, match=r"no default: chat, rag\. Choose one: .*--teacher-chat-template"
        ):
            opened.generate(["Hi"], GREEDY, chat=True)
    with open_folders(folder, chat_template=(None, "rag")) as opened:
        text = opened.mixing.teacher.tokenizer.decode(opened.mixing.teacher.encode_chat([USER]))  # type: ignore[attr-defined]
        assert text.startswith("rag: <|user|>")
        assert opened.generate(["Hi"], GREEDY, chat=True)[0].text
    with pytest.raises(
        InvalidRequest, match=r"no chat template named 'default'\. It has chat, rag\."
    ):
        open_folders(folder, chat_template=(None, "default"))
    with pytest.raises(InvalidRequest, match="have no names"):
        Pair.local(BASE, TEACHER, chat_template="rag")
    assert run_doctor(PairOptions(str(folder / "base"), str(folder / "teacher")), "auto") == 0
    doctor = capsys.readouterr().out
    assert "chat templates chat, rag (none chosen)" in doctor
    assert (
        "chat needs a choice of the teacher's template: --teacher-chat-template chat or rag"
        in doctor
    )
    with open_folders(
        with_named_templates(tmp_path / "defaulted", "default", "tool_use")
    ) as opened:
        text = opened.mixing.teacher.tokenizer.decode(opened.mixing.teacher.encode_chat([USER]))  # type: ignore[attr-defined]
        assert text.startswith("default: ")


def test_template_options_of_the_command_line(tmp_path: Path) -> None:
    folder = with_thinking(tmp_path / "pair", ("base", "teacher"))
    models = ("--base", folder / "base", "--teacher", folder / "teacher")
    variables = ("--chat-template-kwargs", '{"enable_thinking": false}')
    of_base = ("--base-chat-template-kwargs", "{}")
    done = run(
        *("generate", "--max-tokens", 1, "--json", "--chat", "Hi"), *models, *variables, *of_base
    )
    usage = json.loads(done.stdout)["usage"]
    assert usage["prompt_tokens"] > usage["base_prompt_tokens"]
    assert parse_template_kwargs('{"enable_thinking": false}', None) == (OFF, OFF)
    for wrong, says in (
        ("{", "--chat-template-kwargs is not JSON"),
        ("[]", "map names"),
        ('{"tokenize":1}', "honour"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            parse_template_kwargs(wrong, None)


def test_variables_go_to_a_server_that_tokenizes() -> None:
    asked: list[dict[str, Any]] = []

    class Client:
        def call(self, server: Any, path: str, body: dict[str, Any], read: Any) -> Any:
            asked.append(body)
            if "messages" in body:
                return read({"tokens": [3, 4], "count": 2})
            text = body["prompt"]
            ids = [2] * text.count("<s>") + [9] * bool(text.replace("<s>", ""))
            ids = [2] * body["add_special_tokens"] + ids
            return read({"tokens": ids, "count": len(ids)})

        def run(self, answer: Any) -> Any:
            return answer

    model = ServedModel(Client(), None, "m", (0,), frozenset(), 4096, 1024, True)  # type: ignore[arg-type]
    model.encode_chat([USER], OFF)
    model.encode_chat([USER], {})
    assert [body.get("chat_template_kwargs") for body in asked] == [OFF, None]
    assert model.encode("Hi") == model.encode("<s>Hi") == [2, 9]
    assert model.encode("Hi", add_special_tokens=False) == [9]


def test_a_text_that_fills_the_context_is_scored(pair: Pair) -> None:
    whole = [5] * 1024
    scores = pair.score([whole])[0]
    assert scores.error is None and len(scores.diagnostics.logprobs) == 1023
    with pytest.raises(PromptTooLong, match="1025 tokens"):
        pair.score([[*whole, 5]])
    with pytest.raises(PromptTooLong, match="at least one token must fit"):
        pair.generate([whole])
    prepared = pair.prepare([whole], SamplingParams(), Reading(), generates=False)
    assert prepared[0].max_new_tokens == 0


def test_a_huge_prompt_is_refused_at_once(pair: Pair) -> None:
    start = time.process_time()
    for prompt, chat in (("the quick fox " * 500_000, False), ("the quick fox " * 500_000, True)):
        with pytest.raises(
            PromptTooLong, match=r"base prompt 0 has 70\d+ characters, so at least \d+ tokens"
        ):
            pair.generate([prompt], chat=chat)
    assert time.process_time() - start < 2  # tokenized, each took 6 s a side


def byte_level(**changes: Any) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 has it: words of pieces, any other character by its bytes."""
    words = ["▁", "▁a", "▁the", "▁fox", "é", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {
        piece: i for i, piece in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    }
    model = tokenizers.models.BPE(
        vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    found = tokenizers.Tokenizer(model)
    found.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return found


def with_stripping_token() -> tokenizers.Tokenizer:
    found = byte_level()
    found.add_special_tokens([tokenizers.AddedToken("<|user|>", rstrip=True, lstrip=True)])
    return found


BOUNDED = {
    "bytes": byte_level(),
    "NFC": byte_level(normalizer=normalizers.NFC()),
    "NFKC, lower case": byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "stripped": byte_level(normalizer=normalizers.Strip()),
    "spaces collapsed": byte_level(normalizer=normalizers.Replace("  ", " ")),
    "a token that strips": with_stripping_token(),
    "byte fallback": byte_fallback(),
}
UNBOUNDED = {
    "accents dropped": byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "a pattern dropped": byte_level(normalizer=normalizers.Replace(tokenizers.Regex("a+"), "")),
    "letters dropped": byte_level(normalizer=normalizers.Replace("ab", "c")),
    "splits dropped": byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "unknown words": tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    ),
}
WORDS = [
    "a",
    "ab",
    "  ",
    "\n\t",
    "🦊",
    " the fox",
    " disappointed",
    "<|user|>",
    "\u200b",
    "\x00",
    "İ",
    "ﬃ",
]
COMPOSED = ["é", "e\u0301", "α\u0313\u0300\u0345", "\u1112\u1161\u11ab", "カ\u3099"]
PIECES = st.sampled_from([*WORDS, *COMPOSED])


@pytest.mark.parametrize("name", BOUNDED)
@given(
    parts=st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=40), times=st.integers(1, 30)
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_no_text_that_fits_is_refused(name: str, parts: Sequence[str], times: int) -> None:
    tokenizer = BOUNDED[name]
    density = Density.of(tokenizer)
    assert density is not None
    text = "".join(parts) * times
    assert density.fewest_tokens(text) <= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_nothing_can_be_said(name: str) -> None:
    assert Density.of(UNBOUNDED[name]) is None
