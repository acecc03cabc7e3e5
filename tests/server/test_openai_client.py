"""The openai package as a client: completions and chat, plain and streaming, logprobs, errors and retries."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import openai

from tests.server.conftest import Live, bundled_pair, run_server

USER = [{"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["midlogit"]
    assert client.models.retrieve("midlogit").owned_by == "midlogit"


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="midlogit", prompt="Once upon a time", max_tokens=20, seed=1, logprobs=2
    )
    choice = whole.choices[0]
    assert choice.finish_reason in ("length", "stop") and whole.usage is not None
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == whole.usage.completion_tokens
    assert all(lp is not None and lp <= 0 for lp in choice.logprobs.token_logprobs)
    stream = client.completions.create(
        model="midlogit", prompt="Once upon a time", max_tokens=20, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == choice.text


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="midlogit",
        messages=USER,
        max_completion_tokens=20,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        extra_body={"midlogit": {"preset": "exploratory", "diagnostics": True}},
    )
    choice = whole.choices[0]
    assert (
        choice.logprobs is not None
        and choice.logprobs.content is not None
        and whole.usage is not None
    )
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    alphas = choice.model_extra["midlogit"]["diagnostics"]["alpha"]
    assert len(alphas) == whole.usage.completion_tokens and all(0 <= a <= 1 for a in alphas)
    stream = client.chat.completions.create(
        model="midlogit",
        messages=USER,
        max_completion_tokens=20,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"midlogit": {"preset": "exploratory"}},
    )
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == choice.message.content
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason


def test_the_chat_stream_helper(client: openai.OpenAI) -> None:
    # Without max_completion_tokens: the helper takes an answer that was cut off for an error.
    with client.chat.completions.stream(
        model="midlogit", messages=USER, seed=1, temperature=0
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == text


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="midlogit", prompt=[5] * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="midlogit",
            messages=USER,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert tools.value.param == "tools"
    with pytest.raises(openai.UnprocessableEntityError):
        client.completions.create(model="midlogit", prompt="a", temperature=-1)


def test_keys_and_retries_when_the_queue_is_full() -> None:
    async def main(url: str) -> None:
        def client(key: str, retries: int) -> openai.AsyncOpenAI:
            return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries)

        async def ask(opened: openai.AsyncOpenAI) -> object:
            return await opened.completions.create(
                model="midlogit", prompt="a", max_tokens=60, extra_body={"ignore_eos": True}
            )

        async with (
            client("wrong", 0) as wrong,
            client("second-key", 0) as once,
            client("first-key", 20) as patient,
        ):
            with pytest.raises(openai.AuthenticationError) as refused:
                await ask(wrong)
            assert refused.value.code == "invalid_api_key"
            found = await asyncio.gather(*(ask(once) for _ in range(8)), return_exceptions=True)
            full = [error for error in found if isinstance(error, openai.RateLimitError)]
            assert len(full) == 8 - 3
            assert all(error.response.headers["retry-after"] == "1" for error in full)
            assert len(await asyncio.gather(*(ask(patient) for _ in range(6)))) == 6

    settings = {"api_keys": ("first-key", "second-key"), "max_num_seqs": 2, "max_queued": 1}
    with run_server(lambda: bundled_pair(2), **settings) as live:
        asyncio.run(main(live.url))
        live.wait_idle()
