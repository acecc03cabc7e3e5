"""The answers of the two completion endpoints: text, streams, ids, log-probabilities, usage, diagnostics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from midlogit import Pair, SamplingParams
from midlogit.cli.main import app
from midlogit.outputs import Top
from midlogit.server.parameters import sampling_params
from midlogit.server.pieces import completion_logprobs
from tests.server.conftest import Live, run_server
from tests.variants import sentencepiece_pair

PROMPTS = ["Once upon a time", "The dog was", "Tom and Ann went to the"]


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of a pair with SentencePiece-like vocabularies."""
    folders = sentencepiece_pair(tmp_path_factory.mktemp("sentencepiece"))
    with run_server(
        lambda: Pair.local(*folders, dtype="float32", device="cpu", speculation="off")
    ) as live:
        yield live


def cli(*arguments: str) -> str:
    """The output of the command line."""
    result = CliRunner().invoke(
        app, ["generate", "--dtype", "float32", "--device", "cpu", *arguments]
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_greedy_text_is_the_command_lines(server: Live) -> None:
    expected = cli("--temperature", "0", "--max-tokens", "24", "--json", *PROMPTS).splitlines()
    answer = server.complete(PROMPTS, temperature=0, max_tokens=24)
    assert [choice["text"] for choice in answer["choices"]] == [
        json.loads(line)["text"] for line in expected
    ]
    chat = cli("--temperature", "0", "--max-tokens", "24", "--chat", "--json", "Tell me a story.")
    assert (
        server.chat(temperature=0, max_tokens=24)["choices"][0]["message"]["content"]
        == json.loads(chat)["text"]
    )


def test_same_seed_same_text_as_the_library(server: Live) -> None:
    params = SamplingParams.preset("balanced", max_tokens=30, seed=5, n=2)
    expected = [completion.text for completion in server.pair.generate(PROMPTS, params)]
    answer = server.complete(PROMPTS, max_tokens=30, seed=5, n=2)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))


def test_token_ids_are_prompts_too(server: Live) -> None:
    ids = [server.pair.mixing.teacher.encode(prompt) for prompt in PROMPTS]
    by_text = server.complete(PROMPTS, max_tokens=12, seed=1)["choices"]
    by_ids = server.complete(ids, max_tokens=12, seed=1)["choices"]
    assert [c["text"] for c in by_ids] == [c["text"] for c in by_text]
    assert (
        server.complete(ids[0], max_tokens=12, seed=1)["choices"][0]["text"] == by_text[0]["text"]
    )


@pytest.mark.parametrize(
    "extra",
    [{}, {"echo": True}, {"logprobs": 2}, {"stop": ["a", " th"]}, {"echo": True, "logprobs": 1}],
)
def test_streamed_pieces_join_to_the_unstreamed_text(
    server: Live, extra: dict[str, object]
) -> None:
    body = {"prompt": PROMPTS, "max_tokens": 25, "seed": 3, "n": 2, **extra}
    whole = server.complete(body.pop("prompt"), **body)["choices"]  # type: ignore[arg-type]
    pieces = [""] * 6
    logprobs: list[list[float | None]] = [[] for _ in range(6)]
    offsets: list[list[int]] = [[] for _ in range(6)]
    reasons: dict[int, tuple[str, object]] = {}
    for event in server.stream("/v1/completions", {"prompt": PROMPTS, **body}):
        choice = event["choices"][0]
        pieces[choice["index"]] += choice["text"]
        if choice["logprobs"]:
            logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
            offsets[choice["index"]] += choice["logprobs"]["text_offset"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"], choice["stop_reason"]
    assert pieces == [choice["text"] for choice in whole]
    assert [reasons[k] for k in range(6)] == [(c["finish_reason"], c["stop_reason"]) for c in whole]
    for k, choice in enumerate(whole):
        if "logprobs" in extra:
            assert logprobs[k] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
            assert offsets[k] == choice["logprobs"]["text_offset"]


def test_chat_stream_is_the_chat_answer(server: Live) -> None:
    body = {"max_tokens": 30, "seed": 4, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = server.chat(**body)["choices"]
    messages = [{"role": "user", "content": "Tell me a story."}]
    found = ["", ""]
    roles = []
    entries: list[list[dict[str, object]]] = [[], []]
    for event in server.stream("/v1/chat/completions", {"messages": messages, **body}):
        choice = event["choices"][0]
        roles += [choice["delta"]["role"]] if "role" in choice["delta"] else []
        found[choice["index"]] += choice["delta"].get("content", "")
        entries[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    assert roles == ["assistant", "assistant"]
    assert found == [choice["message"]["content"] for choice in whole]
    for k in (0, 1):
        assert [e["token"] for e in entries[k]] == [
            e["token"] for e in whole[k]["logprobs"]["content"]
        ]


def test_characters_of_many_bytes_are_never_split(server: Live) -> None:
    # Drawn from the uniform end of the mixture, text of a small model is full of stray bytes.
    body = {
        "temperature": 50,
        "max_tokens": 200,
        "seed": 9,
        "midlogit": {"preset": "exploratory"},
        "n": 4,
    }
    whole = server.complete("É 你好 🦊", **body)["choices"]
    pieces = [""] * 4
    for event in server.stream("/v1/completions", {"prompt": "É 你好 🦊", **body}):
        pieces[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert pieces == [choice["text"] for choice in whole]
    assert any(not piece.isascii() for piece in pieces)
    ids = server.pair.mixing.teacher.encode("🦊 你好 é")
    parts = server.complete(ids, echo=True, max_tokens=0, logprobs=0)["choices"][0]
    assert parts["text"] == "🦊 你好 é"
    data = b"".join(
        bytes.fromhex(t[6:].replace("\\x", "")) if t.startswith("bytes:") else t.encode()
        for t in parts["logprobs"]["tokens"]
    )
    assert data.decode() == "🦊 你好 é"


def streamed(server: Live, body: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a stream, put together."""
    found: dict[str, Any] = {"text": "", "tokens": [], "text_offset": []}
    for event in server.stream("/v1/completions", body):
        choice = event["choices"][0]
        found["text"] += choice["text"]
        for name in ("tokens", "text_offset"):
            found[name] += (choice["logprobs"] or {name: []})[name]
    return found


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("kind", ["server", "spaced"])
def test_prompts_that_end_inside_a_character(
    kind: str, echo: bool, request: pytest.FixtureRequest
) -> None:
    server: Live = request.getfixturevalue(kind)
    teacher = server.pair.mixing.teacher
    decode = teacher.tokenizer.backend_tokenizer.decode
    ids = teacher.encode("I like 🦊")
    for missing in range(4):
        prompt = ids[: len(ids) - missing]
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "logprobs": 1, "echo": echo}
        choice = server.post("/v1/completions", {**body, "return_token_ids": True}).json()[
            "choices"
        ][0]
        before, whole = decode(prompt), decode(prompt + choice["token_ids"])
        assert whole.startswith(before) and before.endswith("\ufffd" if missing else "🦊")
        text, logprobs = whole if echo else whole.removeprefix(before), choice["logprobs"]
        assert choice["text"] == text
        for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            shown = name if not echo or offset else name.lstrip()
            assert text[offset:].startswith(shown) or name.startswith("bytes:")
        expected = {
            "text": text,
            "tokens": logprobs["tokens"],
            "text_offset": logprobs["text_offset"],
        }
        assert streamed(server, body) == expected
        if missing != 2:
            continue
        stop = whole[-4:-1]
        cut = server.post("/v1/completions", {**body, "stop": stop}).json()["choices"][0]["text"]
        start = len(before) + whole[len(before) :].index(stop)
        assert cut == (whole[:start] if echo else whole[len(before) : start])
        assert streamed(server, {**body, "stop": stop})["text"] == cut


@pytest.mark.parametrize("kind", ["server", "spaced"])
def test_a_character_that_the_prompt_began_and_the_completion_ends(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Live = request.getfixturevalue(kind)
    ids = server.pair.mixing.teacher.encode("I like 🦊")
    masked = tuple(i for i in range(4096) if i != ids[-1])

    def only_the_last(*args: Any, **kwargs: Any) -> SamplingParams:
        return replace(sampling_params(*args, **kwargs), special_token_ids=masked)

    monkeypatch.setattr("midlogit.server.completions.sampling_params", only_the_last)
    for echo, missing, text, offsets in (
        (False, 1, "🦊", [0]),
        (True, 1, "I like 🦊", [0, 1, 6, 7, 7, 7, 7]),
        (
            True,
            2,
            "I like \ufffd" if kind == "server" else "I like " + "\ufffd" * 3,
            [0, 1, 6, 7, 7, 7],
        ),
    ):
        body = {
            "prompt": ids[:-missing],
            "max_tokens": 1,
            "echo": echo,
            "logprobs": 0,
            "ignore_eos": True,
        }
        choice = server.post("/v1/completions", body).json()["choices"][0]
        found = streamed(server, body)
        assert choice["text"] == found["text"] == text
        assert choice["logprobs"]["text_offset"] == found["text_offset"] == offsets


def test_a_replacement_character_in_the_prompt_is_no_unfinished_one(server: Live) -> None:
    body = {"prompt": "The caf\ufffd", "temperature": 0, "max_tokens": 8, "echo": True}
    text = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert text.startswith("The caf\ufffd The") and text == streamed(server, body)["text"]
    assert (
        server.complete("The caf\ufffd", temperature=0, max_tokens=8)["choices"][0]["text"]
        == text[8:]
    )


def test_tokens_keep_their_spaces(spaced: Live) -> None:
    """Where tokens carry the space before a word, as in SentencePiece's vocabularies."""
    body = {
        "prompt": "Tom and\nAnn",
        "temperature": 0,
        "max_tokens": 12,
        "logprobs": 20,
        "echo": True,
    }
    choice = spaced.post("/v1/completions", body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == " " + choice["text"]
    assert choice["text"].startswith("Tom and\nAnn")
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    for token, start, end in zip(logprobs["tokens"], logprobs["text_offset"], ends, strict=True):
        assert choice["text"][start:end] == token.removeprefix("" if start else " ")
    assert streamed(spaced, body)["tokens"] == logprobs["tokens"]
    answer = spaced.chat(temperature=0, max_tokens=12, logprobs=True)["choices"][0]
    entries = answer["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == answer["message"]["content"]
    assert (
        b"".join(bytes(entry["bytes"]) for entry in entries).decode()
        == answer["message"]["content"]
    )
    found = spaced.post("/tokenize", {"prompt": "A  fox!\n", "return_token_strs": True}).json()
    assert "".join(found["token_strs"]) == " A  fox!\n"
    tokens = list(spaced.pair.stream("Tom and", SamplingParams(temperature=0, max_tokens=8)))
    completion = tokens.pop()
    assert "".join(token.token for token in tokens) == completion.text


@pytest.mark.parametrize("kind", ["server", "spaced"])
def test_every_candidate_has_its_own_entry(kind: str, request: pytest.FixtureRequest) -> None:
    server: Live = request.getfixturevalue(kind)
    body = {"prompt": ["x"] * 24, "temperature": 100, "max_tokens": 8, "seed": 1, "logprobs": 20}
    facts = {"preset": "exploratory", "diagnostics": True}
    for choice in server.post("/v1/completions", {**body, "midlogit": facts}).json()["choices"]:
        drawn = zip(choice["logprobs"]["top_logprobs"], choice["logprobs"]["tokens"], strict=True)
        for (named, token), top in zip(drawn, choice["midlogit"]["top"], strict=True):
            values = sorted(lp for _, lp in top["q"])
            assert len(named) in (20, 21) and token in named
            assert sorted(named.values())[-20:] == pytest.approx(values)


def test_ids_with_one_name_are_told_apart(spaced: Live) -> None:
    vocabulary = spaced.service.vocabulary
    names: dict[str, list[int]] = {}
    for token_id in range(4096):
        names.setdefault(vocabulary.text(token_id), []).append(token_id)
    for name, ids in names.items():
        if len(ids) > 1:
            top = Top([(i, -1.0 - n) for n, i in enumerate(ids)], [], [])
            offsets = vocabulary.offsets(())
            found = completion_logprobs(ids[1:2], [-2.0], [top], offsets, vocabulary, False)[
                "top_logprobs"
            ][0]
            expected = {name: -2.0, f"token_id:{ids[0]}": -1.0}
            assert (
                found is not None and found.items() >= expected.items() and len(found) == len(ids)
            )


def test_a_stop_string_that_begins_before_min_tokens(server: Live) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "logprobs": 0}
    free = server.post("/v1/completions", body).json()["choices"][0]
    tokens, text = free["logprobs"]["tokens"], free["text"]
    for count in (1, 2, 3, 6):
        stop = tokens[count - 1] + tokens[count]
        asked = {**body, "stop": stop, "min_tokens": count}
        choice = server.post("/v1/completions", asked).json()["choices"][0]
        before = len("".join(tokens[:count]))
        assert choice["text"] == text[: text.index(stop, max(before + 1 - len(stop), 0))]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert len(choice["logprobs"]["tokens"]) == count + 1
        assert streamed(server, asked)["text"] == choice["text"]
        # All of it before min_tokens: text like any other.
        late = {**body, "stop": stop, "min_tokens": count + 1}
        choice = server.post("/v1/completions", late).json()["choices"][0]
        assert choice["text"].startswith(text[: before + len(tokens[count])])
        assert streamed(server, late)["text"] == choice["text"]


def test_stop_strings_never_leak(server: Live) -> None:
    free = server.complete("Once upon a time", max_tokens=40, temperature=0)["choices"][0]["text"]
    for stop in (free[10:13], free[20:26], free[5]):
        body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "stop": stop}
        choice = server.post("/v1/completions", body).json()["choices"][0]
        assert choice["text"] == free[: free.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        streamed = "".join(e["choices"][0]["text"] for e in server.stream("/v1/completions", body))
        assert streamed == choice["text"]


def test_stop_ids_and_lengths(server: Live) -> None:
    ids = server.complete(PROMPTS[0], max_tokens=10, temperature=0, return_token_ids=True)[
        "choices"
    ][0]["token_ids"]
    stopped = server.complete(
        PROMPTS[0], max_tokens=10, temperature=0, stop_token_ids=[ids[4]], return_token_ids=True
    )
    choice = stopped["choices"][0]
    assert choice["token_ids"] == ids[: ids.index(ids[4]) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[4])
    answer = server.complete(PROMPTS[0], max_tokens=300, ignore_eos=True, seed=1)
    assert answer["usage"]["completion_tokens"] == 300
    assert answer["choices"][0]["finish_reason"] == "length"
    answer = server.chat(max_tokens=120, min_tokens=100, seed=1)
    assert 100 <= answer["usage"]["completion_tokens"] <= 120


def test_usage_counts_each_prompt_once(server: Live) -> None:
    answer = server.complete(PROMPTS, max_tokens=7, ignore_eos=True, n=3)
    prompt_tokens = sum(len(server.pair.mixing.teacher.encode(prompt)) for prompt in PROMPTS)
    expected = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 63,
        "total_tokens": prompt_tokens + 63,
    }
    assert answer["usage"] == expected
    body = {
        "prompt": PROMPTS,
        "max_tokens": 7,
        "ignore_eos": True,
        "n": 3,
        "stream_options": {"include_usage": True},
    }
    *chunks, last = server.stream("/v1/completions", body)
    assert last["choices"] == [] and last["usage"] == expected
    assert all(chunk["usage"] is None for chunk in chunks)
    assert all(
        "usage" not in chunk
        for chunk in server.stream("/v1/completions", {"prompt": "a", "max_tokens": 2})
    )


def test_token_ids_come_back(server: Live) -> None:
    answer = server.complete(
        PROMPTS[0], max_tokens=5, return_token_ids=True, midlogit={"diagnostics": True}
    )
    choice = answer["choices"][0]
    mixing = server.pair.mixing
    assert choice["prompt_token_ids"] == mixing.teacher.encode(PROMPTS[0])
    assert choice["midlogit"]["base_prompt_token_ids"] == mixing.base.encode(PROMPTS[0])
    assert choice["text"] == mixing.teacher.tokenizer.decode(
        choice["token_ids"], skip_special_tokens=True
    )
    body = {"prompt": PROMPTS[0], "max_tokens": 5, "seed": 2, "return_token_ids": True}
    whole = server.post("/v1/completions", body).json()["choices"][0]
    chunks = [event["choices"][0] for event in server.stream("/v1/completions", body)]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [i for chunk in chunks for i in chunk.get("token_ids", [])] == whole["token_ids"]
    named = server.complete(
        PROMPTS[0], max_tokens=3, logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True
    )
    choice = named["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


def test_diagnostics_are_those_of_generate_json(server: Live) -> None:
    line = cli("--max-tokens", "12", "--seed", "6", "--json", PROMPTS[0])
    expected = json.loads(line)["diagnostics"]
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "seed": 6, "midlogit": {"diagnostics": True}}
    whole = server.post("/v1/completions", body).json()["choices"][0]["midlogit"]["diagnostics"]
    assert whole.keys() == expected.keys()
    for name, values in expected.items():
        assert whole[name] == pytest.approx(values, abs=1e-4)
    streamed: dict[str, list[float]] = {name: [] for name in expected}
    for event in server.stream("/v1/completions", body):
        facts = event["choices"][0].get("midlogit")
        for name in expected if facts else ():
            streamed[name] += facts["diagnostics"][name]
    for name, values in whole.items():
        assert streamed[name] == pytest.approx(values, abs=1e-4)


def test_logprobs_are_log_q_of_what_was_sampled_from(server: Live) -> None:
    body = {"max_tokens": 10, "seed": 8, "temperature": 0.7, "midlogit": {"diagnostics": True}}
    choice = server.complete(PROMPTS[0], logprobs=3, **body)["choices"][0]
    facts = choice["midlogit"]
    assert choice["logprobs"]["token_logprobs"] == facts["diagnostics"]["logprobs"]
    for top, named in zip(facts["top"], choice["logprobs"]["top_logprobs"], strict=True):
        for token_id, logprob in top["q"]:
            assert named[facts["tokens"][str(token_id)]] == pytest.approx(logprob)
    # The whole support of a small nucleus sums to one.
    narrow = server.complete(PROMPTS[0], logprobs=20, max_tokens=1, midlogit={"target_top_p": 0.1})[
        "choices"
    ][0]
    assert math.fsum(
        math.exp(v) for v in narrow["logprobs"]["top_logprobs"][0].values()
    ) == pytest.approx(1)


def test_controls_of_the_mixture(server: Live) -> None:
    def alphas(**options: object) -> list[float]:
        facts = {"diagnostics": True, **options}
        choice = server.complete(PROMPTS[0], max_tokens=8, seed=1, midlogit=facts)["choices"][0][
            "midlogit"
        ]
        return choice["diagnostics"]["alpha"]

    assert alphas()[0] == 1 and alphas(force_first_token=False)[0] < 1
    assert alphas(preset="exploratory")[0] < 1
    assert set(alphas(alpha_rule="fixed:0.25", force_first_token=False)) == {0.25}
    facts = {"diagnostics": True, "alpha_rule": "kl-budget:0.01"}
    held = server.complete(PROMPTS[0], max_tokens=8, seed=1, midlogit=facts)["choices"][0][
        "midlogit"
    ]
    assert max(held["diagnostics"]["kl_base"][1:]) <= 0.01 + 1e-5
    own = server.complete(
        PROMPTS[0], max_tokens=4, midlogit={"base_prompt": "A dog", "diagnostics": True}
    )
    assert own["choices"][0]["midlogit"]["base_prompt_tokens"] == len(
        server.pair.mixing.base.encode("A dog")
    )
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    ids = server.pair.mixing.base.encode_chat(messages)
    for base_prompt in (messages, ids):
        own = server.chat(
            max_tokens=4, seed=3, midlogit={"base_prompt": base_prompt, "diagnostics": True}
        )
        assert own["choices"][0]["midlogit"]["base_prompt_tokens"] == len(ids)


def test_each_side_reads_the_chat_in_its_own_template(server: Live) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
    ]
    body = {
        "messages": messages,
        "max_completion_tokens": 4,
        "return_token_ids": True,
        "midlogit": {"diagnostics": True},
    }
    answer = server.post("/v1/chat/completions", body).json()
    mixing = server.pair.mixing
    assert answer["prompt_token_ids"] == mixing.teacher.encode_chat(messages)
    assert answer["choices"][0]["midlogit"]["base_prompt_token_ids"] == mixing.base.encode_chat(
        messages
    )
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    same = {
        **body,
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
        ],
    }
    assert (
        server.post("/v1/chat/completions", same).json()["prompt_token_ids"]
        == answer["prompt_token_ids"]
    )


def test_small_routes(server: Live) -> None:
    card = server.http.get("/v1/models").json()["data"][0]
    assert (
        card["id"] == "midlogit"
        and card["max_model_len"] == 1024
        and card["stop_token_ids"] == [1, 0]
    )
    assert server.http.get("/v1/models/midlogit").json() == card
    ids = server.post("/tokenize", {"prompt": "A fox!", "return_token_strs": True}).json()
    assert ids["tokens"] == server.pair.mixing.teacher.encode("A fox!") and ids["count"] == len(
        ids["tokens"]
    )
    assert "".join(ids["token_strs"]) == "A fox!"
    assert server.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "A fox!"}
    messages = [{"role": "user", "content": "Hi"}]
    read = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert read == server.pair.mixing.teacher.encode_chat(messages)
    assert (
        server.http.get("/tokenizer_info").json()["eos_token"]
        == server.pair.mixing.teacher.tokenizer.eos_token
    )
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/version").json().keys() == {"version"}
    assert "prefers-color-scheme" in server.http.get("/").text
