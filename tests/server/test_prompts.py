"""Prompts as clients of the server send them: template variables, BOS, named templates, huge texts, full contexts."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import openai

from tests.server.conftest import Live, run_server
from tests.variants import (
    edit,
    open_folders,
    thinking,
    with_bos,
    with_named_templates,
    with_template,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def thoughtful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A pair with BOS and a switch in both templates."""
    folder = with_bos(tmp_path_factory.mktemp("thoughtful") / "pair")
    template: list[str] = []
    edit(
        folder / "teacher" / "tokenizer_config.json",
        lambda data: template.append(thinking(data["chat_template"])),
    )
    for side in ("base", "teacher"):
        edit(
            folder / side / "tokenizer_config.json",
            lambda data: data.update(chat_template=template[0]),
        )
    with run_server(lambda: open_folders(folder)) as live:
        yield live


def sizes(live: Live, **fields: Any) -> tuple[int, int]:
    """Tokens of the prompts that base and teacher read."""
    options = {"diagnostics": True, **fields.pop("midlogit", {})}
    body = {"max_tokens": 1, "midlogit": options, **fields}
    answer = live.post(CHAT if "messages" in fields else COMPLETIONS, body)
    assert answer.status_code == 200, answer.text
    data = answer.json()
    return data["choices"][0]["midlogit"]["base_prompt_tokens"], data["usage"]["prompt_tokens"]


def test_template_variables_reach_both_sides(thoughtful: Live) -> None:
    on = sizes(thoughtful, messages=[USER])
    assert on[0] == on[1]
    off = sizes(thoughtful, messages=[USER], chat_template_kwargs=OFF)
    assert off[0] == off[1] > on[0]
    own: dict[str, Any] = {"base_chat_template_kwargs": OFF}
    assert sizes(thoughtful, messages=[USER], midlogit=own) == (off[0], on[1])
    own = {"base_chat_template_kwargs": {}}
    assert sizes(thoughtful, messages=[USER], chat_template_kwargs=OFF, midlogit=own) == (
        on[0],
        off[1],
    )
    # Where only the base reads a chat, the variables are its own.
    own = {"base_prompt": [USER], "base_chat_template_kwargs": OFF}
    assert sizes(thoughtful, prompt="Hi", midlogit=own)[0] == off[0]

    with openai.OpenAI(base_url=f"{thoughtful.url}/v1", api_key="none", max_retries=0) as client:
        made = client.chat.completions.create(
            model="midlogit",
            messages=[{"role": "user", "content": "Hi"}],
            max_completion_tokens=1,
            extra_body={"chat_template_kwargs": OFF},
        )
        assert made.usage is not None and made.usage.prompt_tokens == off[1]
    tokenized = thoughtful.post(
        "/tokenize", {"messages": [USER], "chat_template_kwargs": OFF}
    ).json()
    assert tokenized["count"] == off[1]


def test_template_variables_of_the_server(thoughtful: Live) -> None:
    from dataclasses import replace

    plain = sizes(thoughtful, messages=[USER])
    usual = thoughtful.service.settings
    thoughtful.service.settings = replace(usual, chat_template_kwargs=({}, OFF))
    try:
        assert sizes(thoughtful, messages=[USER]) == (
            plain[0],
            sizes(thoughtful, messages=[USER])[1],
        )
        assert sizes(thoughtful, messages=[USER])[1] > plain[1]
        assert (
            sizes(thoughtful, messages=[USER], chat_template_kwargs={"enable_thinking": True})
            == plain
        )
        sizes(thoughtful, prompt="Hi")  # a default asks for nothing where nothing is a chat
    finally:
        thoughtful.service.settings = usual


def test_bos_occurs_once(thoughtful: Live) -> None:
    ids = thoughtful.pair.mixing.teacher.encode("Once upon a time")
    plain = sizes(thoughtful, prompt="Once upon a time")
    assert plain == sizes(thoughtful, prompt="<s>Once upon a time") == (len(ids), len(ids))
    without = sizes(thoughtful, prompt="Once upon a time", add_special_tokens=False)
    assert without == (len(ids) - 1, len(ids) - 1)
    assert sizes(thoughtful, prompt="<s>Once upon a time", add_special_tokens=False) == plain

    def tokens(**fields: Any) -> list[int]:
        return list(thoughtful.post("/tokenize", fields).json()["tokens"])

    assert tokens(prompt="Once upon a time") == tokens(prompt="<s>Once upon a time") == ids
    assert tokens(prompt="Once upon a time", add_special_tokens=False) == ids[1:]
    assert tokens(messages=[USER], add_special_tokens=False) == tokens(messages=[USER])
    scored = {"echo": True, "max_tokens": 0, "logprobs": 0, "midlogit": {"preset": "exploratory"}}
    texts = ["Once upon a time", "<s>Once upon a time"]
    logprobs = [
        c["logprobs"]["token_logprobs"] for c in thoughtful.complete(texts, **scored)["choices"]
    ]
    assert logprobs[0][1:] == pytest.approx(logprobs[1][1:]) and min(logprobs[1][1:]) > -9999


def test_messages_of_the_evaluation_harness(server: Live) -> None:
    """As lm-evaluation-harness 0.4.11 sends them."""
    body = {
        "messages": [{"role": "user", "content": "Hi", "type": "text"}],
        "model": "midlogit",
        "max_tokens": 2,
        "temperature": 0.0,
        "stop": ["."],
        "seed": 1234,
    }
    answer = server.post(CHAT, body)
    assert answer.status_code == 200
    assert (
        answer.json()["choices"][0]["message"]
        == server.chat("Hi", max_tokens=2, temperature=0, stop=["."])["choices"][0]["message"]
    )


def test_named_templates_without_a_default(tmp_path: Path) -> None:
    folder = with_named_templates(tmp_path / "pair", "chat", "rag")
    with run_server(lambda: open_folders(folder)) as live:
        answer = live.post(CHAT, {"messages": [USER], "max_tokens": 1})
        assert answer.status_code == 400
        assert "no default: chat, rag" in answer.json()["error"]["message"]
        assert live.http.get("/tokenizer_info").json()["chat_template"] is None
        assert live.complete("Hi", max_tokens=1)["choices"]
    with run_server(lambda: open_folders(folder, chat_template=(None, "rag"))) as live:
        assert live.chat("Hi", max_tokens=1)["choices"]
        assert live.http.get("/tokenizer_info").json()["chat_template"].startswith("rag: ")


def test_a_huge_prompt_is_refused_at_once(server: Live) -> None:
    for path, fields in (
        (COMPLETIONS, {"prompt": "the quick fox " * 500_000}),
        (CHAT, {"messages": [{"role": "user", "content": "the quick fox " * 500_000}]}),
    ):
        start = time.process_time()
        answer = server.post(path, fields)
        assert time.process_time() - start < 2  # tokenized, it took 12 s
        assert (
            answer.status_code == 400
            and answer.json()["error"]["code"] == "context_length_exceeded"
        )


def test_more_prompts_than_fit_are_refused_before_they_are_read(server: Live) -> None:
    start = time.process_time()
    answer = server.post(COMPLETIONS, {"prompt": ["the quick fox " * 60] * 5000})
    assert time.process_time() - start < 2
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "too_many_completions"


def test_a_long_text_holds_up_nobody(server: Live) -> None:
    took: list[float] = []

    def tokenize_much() -> None:
        start = time.perf_counter()
        assert (
            server.post("/tokenize", {"prompt": "the quick fox " * 40_000}).json()["count"]
            == 120_002
        )
        took.append(time.perf_counter() - start)

    thread = threading.Thread(target=tokenize_much)
    thread.start()
    time.sleep(0.1)
    answered = 0
    while thread.is_alive():
        server.complete("Once", max_tokens=1)
        answered += 1
    thread.join()
    assert answered > 3  # in one line with the long text it was the first that waited for all of it


def test_texts_that_fill_the_context(server: Live) -> None:
    whole = [5] * 1024
    score = {"max_tokens": 0, "echo": True}
    scored = server.complete(whole, **score, logprobs=0)
    assert (
        len(scored["choices"][0]["logprobs"]["tokens"]) == scored["usage"]["prompt_tokens"] == 1024
    )
    assert server.complete(whole, **score)["usage"]["prompt_tokens"] == 1024
    for fields in (
        {"prompt": [*whole, 5], **score},
        {"prompt": whole, "max_tokens": 1, "echo": True},
    ):
        answer = server.post(COMPLETIONS, fields)
        assert (
            answer.status_code == 400
            and answer.json()["error"]["code"] == "context_length_exceeded"
        )
    server.wait_idle()


def test_a_template_that_fails_is_an_error_of_the_request(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "pair", "{{ 1 / 0 }}", ("base", "teacher"))
    with run_server(lambda: open_folders(folder)) as live:
        for path, fields in ((CHAT, {}), (CHAT, {"stream": True}), ("/tokenize", {})):
            answer = live.post(path, {"messages": [USER], **fields})
            assert answer.status_code == 400 and "division by zero" in answer.text
        assert live.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 1}).status_code == 200
