"""Anything that cannot work is one clear error, before anything is generated where it can be known."""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copytree

import pytest

from midlogit import (
    InvalidRequest,
    ModelUnavailable,
    Pair,
    PairMismatch,
    PromptTooLong,
    SamplingParams,
    Upstream,
)
from midlogit.cli.main import app
from midlogit.errors import ServerUnavailable
from midlogit.models.checkpoint import bundled
from tests.http.conftest import Urls
from tests.http.proxy import Proxy, from_elsewhere


def refused(
    base: str | Upstream, teacher: str | Upstream, kind: type[Exception], **options: object
) -> str:
    with pytest.raises(kind) as caught:
        Pair.http(base, teacher, **options).close()  # type: ignore[arg-type]
    assert isinstance(caught.value, kind)
    return str(caught.value)


def test_nothing_listens_there(urls: Urls) -> None:
    message = refused("http://127.0.0.1:9/v1", urls.teacher, ServerUnavailable)
    assert "base http://127.0.0.1:9/v1" in message and "vllm serve" in message


def test_not_an_http_url(urls: Urls) -> None:
    assert "not an http URL" in refused("localhost:9000", urls.teacher, InvalidRequest)


def test_not_such_a_server(tmp_path: Path, urls: Urls) -> None:
    with Proxy(urls.base) as base:
        base.rewrite_answer = lambda path, body: {"hello": "world"}
        assert "does not answer like a vLLM server" in refused(
            base.url, urls.teacher, ServerUnavailable, max_retries=0
        )


def test_path_without_v1(urls: Urls) -> None:
    bare = urls.base.removesuffix("/v1")
    assert f"Did you mean {bare}/v1?" in refused(bare, urls.teacher, ServerUnavailable)


def test_a_redirect_is_told_not_followed(urls: Urls) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(308)
            self.send_header("Location", f"{urls.base}/models")
            self.end_headers()

        def log_message(self, format: str, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        message = refused(
            f"http://127.0.0.1:{server.server_port}/v1", urls.teacher, ServerUnavailable
        )
        server.shutdown()
    assert f"it redirects to {urls.base}/models" in message


def test_a_key_with_a_line_break(urls: Urls) -> None:
    message = refused(urls.base, Upstream(urls.teacher, api_key="sk-secret\nX: y"), InvalidRequest)
    assert "The teacher API key holds a line break" in message and "sk-" not in message


def test_wrong_key_is_named_by_its_option_and_never_shown(
    urls: Urls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("MIDLOGIT_TEACHER_API_KEY", "sk-of-teacher")
    seen: list[str] = []
    with Proxy(urls.base) as base, Proxy(urls.teacher) as teacher, caplog.at_level(logging.DEBUG):
        for proxy in (base, teacher):
            proxy.authorize = lambda key: seen.append(key) or True
        Pair.http(base.url, teacher.url).close()
        assert {"Bearer sk-of-openai", "Bearer sk-of-teacher"} == set(seen)
        base.authorize = lambda key: False
        message = refused(Upstream(base.url, api_key="sk-secret"), teacher.url, ServerUnavailable)
    assert (
        "base http" in message and "refuses the API key" in message and "--base-api-key" in message
    )
    assert "sk-" not in message + caplog.text


def test_model_that_is_not_served(urls: Urls) -> None:
    message = refused(urls.base, Upstream(urls.teacher, model="nope"), InvalidRequest)
    assert "does not serve 'nope'" in message and "bundled/teacher" in message


def test_top_k_above_the_limit(urls: Urls) -> None:
    with Proxy(urls.base) as base:
        base.max_logprobs = 20
        message = refused(base.url, urls.teacher, InvalidRequest, top_k=50)
    assert "allows 20" in message and "--max-logprobs 50" in message


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": "8"}, "max_num_seqs is '8'. It must be a whole number."),
        ({"max_retries": 2.5}, "max_retries is 2.5. It must be a whole number."),
        ({"timeout": None}, "timeout is None. It must be a number."),
    ],
)
def test_numbers_that_cannot_be_used(urls: Urls, option: dict[str, object], says: str) -> None:
    assert says in refused(urls.base, urls.teacher, InvalidRequest, **option)


@pytest.mark.parametrize("top_k", [0, "many"])
def test_top_k_that_is_none(urls: Urls, top_k: object) -> None:
    assert "top_k" in refused(urls.base, urls.teacher, InvalidRequest, top_k=top_k)


def test_context_longer_than_one_server_allows(urls: Urls) -> None:
    with Proxy(urls.base) as base:

        def shorten(path: str, body: dict[str, object]) -> dict[str, object]:
            for card in body.get("data", []):
                card["max_model_len"] = 24
            return body

        base.rewrite_answer = shorten
        with Pair.http(base.url, urls.teacher) as pair:
            with pytest.raises(PromptTooLong, match=r"base's context window (is )?24"):
                pair.generate(["a fox " * 40])
            # What fits is cut off at the window, not refused by the server.
            completion = pair.generate(["a fox"], SamplingParams(max_tokens=100, ignore_eos=True))[
                0
            ]
        used = len(pair.mixing.base.encode("a fox")) + len(completion.token_ids)
    assert (completion.finish_reason, used) == ("length", 24)


def test_tokenizers_that_differ(urls: Urls, tmp_path: Path) -> None:
    other = tmp_path / "other"
    copytree(bundled("teacher"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)[100:]
    for name, moved in zip(names, names[1:] + names[:1], strict=True):
        vocabulary[name] = 100 + names.index(moved)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(urls.base, Upstream(urls.teacher, tokenizer=other), PairMismatch)
    assert "not those of the teacher" in message
    # And where the server itself has the other tokenizer.
    with Proxy(urls.teacher) as teacher:

        def shift(path: str, body: dict[str, object]) -> dict[str, object]:
            body = from_elsewhere(path, body)
            return body | {"tokens": [i + 1 for i in body["tokens"]]} if "tokens" in body else body

        teacher.rewrite_answer = shift
        message = refused(urls.base, teacher.url, PairMismatch)
    assert "tokenizers disagree" in message


def test_fewer_logprobs_than_asked(urls: Urls) -> None:
    def cut(path: str, body: dict[str, object]) -> dict[str, object]:
        for choice in body.get("choices", []):
            if choice["logprobs"]:
                choice["logprobs"]["top_logprobs"] = [
                    dict(list(row.items())[:5]) for row in choice["logprobs"]["top_logprobs"]
                ]
        return body

    with Proxy(urls.base) as base:
        base.rewrite_answer = cut
        message = refused(base.url, urls.teacher, ServerUnavailable, max_retries=0)
    assert "returned 5 log-probabilities where 20 were asked for" in message


def test_logprobs_cut_short_in_passing_are_asked_for_again(urls: Urls) -> None:
    """vLLM answers so while another of its clients has chosen ids scored."""
    answers = []

    def cut_first(path: str, body: dict[str, object]) -> dict[str, object]:
        listed = [choice["logprobs"] for choice in body.get("choices", []) if choice["logprobs"]]
        answers.extend(listed)
        if len(listed) == 2 == len(answers):
            for logprobs in listed:
                logprobs["top_logprobs"] = [
                    dict(list(row.items())[:1]) for row in logprobs["top_logprobs"]
                ]
        return body

    with Proxy(urls.base) as base:
        base.rewrite_answer = cut_first
        with Pair.http(base.url, urls.teacher):
            assert len(answers) > 2


def test_decoded_strings_in_place_of_ids(urls: Urls) -> None:
    """Texts are not unique: two ids of one text would be one entry."""

    def without(path: str, body: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in body.items() if name != "return_tokens_as_token_ids"}

    with Proxy(urls.base) as base:
        base.rewrite_request = without
        message = refused(base.url, urls.teacher, ServerUnavailable, max_retries=0)
    assert "by token id" in message and "return_tokens_as_token_ids" in message


def test_probabilities_above_one(urls: Urls) -> None:
    def raw(path: str, body: dict[str, object]) -> dict[str, object]:
        for choice in body.get("choices", []):
            if choice["logprobs"]:
                choice["logprobs"]["top_logprobs"] = [
                    {key: value + 9 for key, value in row.items()}
                    for row in choice["logprobs"]["top_logprobs"]
                ]
        return body

    with Proxy(urls.base) as base:
        base.rewrite_answer = raw
        message = refused(base.url, urls.teacher, ServerUnavailable, max_retries=0)
    assert "--logprobs-mode" in message


def test_no_tokenizer_anywhere(urls: Urls) -> None:
    with Proxy(urls.base) as base:
        base.rewrite_answer = from_elsewhere
        base.rewrite_request = lambda path, body: {} if path == "/tokenize" else body
        assert "--base-tokenizer" in refused(base.url, urls.teacher, ModelUnavailable)


@pytest.mark.parametrize("what", ["ignores", "refuses"])
def test_server_without_chosen_id_scoring_works(urls: Urls, what: str) -> None:
    """Older vLLM ignores logprob_token_ids or refuses it; then upper bounds must do."""
    with Proxy(urls.base) as base, Proxy(urls.teacher) as teacher:
        for proxy in (base, teacher):
            if what == "ignores":
                proxy.rewrite_request = lambda path, body: {
                    k: v for k, v in body.items() if k != "logprob_token_ids"
                }
            else:
                proxy.refuse = lambda body: "logprob_token_ids" in body
        params = SamplingParams(max_tokens=12, seed=1)
        with (
            Pair.http(base.url, teacher.url) as without,
            Pair.http(urls.base, urls.teacher) as full,
        ):
            cut = without.generate(["Once there was a fox"], params)[0]
            scored = full.generate(["Once there was a fox"], params)[0]
    assert cut.finish_reason in ("length", "stop")
    # The first two positions have the same prefix.
    assert cut.token_ids[0] == scored.token_ids[0]
    assert cut.diagnostics.tv_bound[1] >= scored.diagnostics.tv_bound[1]


def test_command_line(urls: Urls, capsys: pytest.CaptureFixture[str]) -> None:
    servers = ["--base", urls.base, "--teacher", urls.teacher]

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            app([*arguments], standalone_mode=True)
        return int(caught.value.code or 0), capsys.readouterr().out

    code, out = run(
        "generate", "Tell me a story.", "--chat", "--max-tokens", "8", "--seed", "1", *servers
    )
    assert code == 0 and out.strip()
    code, out = run("doctor", *servers)
    assert code == 0
    scoring = "cannot be scored" if "vLLM 0.24" in out else "can be scored"
    for part in (
        urls.base,
        urls.teacher,
        "up to 4096 log-probabilities",
        scoring,
        "drafts are verified by a prompt for each",
        "can be mixed",
        "stop ids: 1",
    ):
        assert part in out
    with pytest.raises(InvalidRequest, match="two servers or two folders"):
        app(["generate", "x", "--base", urls.base, "--teacher", "folder"], standalone_mode=False)
    with pytest.raises(InvalidRequest, match="--top-k"):
        app(["generate", "x", *servers, "--top-k", "many"], standalone_mode=False)
