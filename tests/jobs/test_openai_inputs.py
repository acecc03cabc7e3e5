"""Lines of OpenAI batch files as rows: what a body sets, what it cannot have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from midlogit import KLBudget, SamplingParams
from midlogit.jobs.inputs import require_reading, with_overrides
from midlogit.requests.prompts import Reading
from tests.jobs.test_inputs import CHAT, read, refused

TEXT = "/v1/completions"


def batch_line(body: object, url: str = "/v1/chat/completions", **others: Any) -> bytes:
    return json.dumps(
        {"custom_id": "r1", "method": "POST", "url": url, "body": body} | others
    ).encode()


def test_whose_stop_id_and_prompts(tmp_path: Path) -> None:
    """A trainer's line: the prompt is the base's, the teacher has its own."""
    mixture = {"preset": "rollout", "stop_id": "teacher", "teacher_prompt": CHAT}
    (row,) = read(tmp_path, batch_line({"prompt": [5, 6], "midlogit": mixture}, TEXT))
    assert row.error is None and (row.prompt, row.base_prompt) == (CHAT, [5, 6])
    params = with_overrides(SamplingParams(max_tokens=100), row.overrides)
    assert params.stop_id == "teacher" and not params.exclude_special_tokens
    assert params.alpha_rule == KLBudget(0.0025) and not params.constraint_to_target
    for body, said in (
        ({"prompt": "A", "midlogit": {"teacher_prompt": ["A", "B"]}}, "1 prompts and 2"),
        ({"prompt": "A", "prompt_logprobs": 1}, "prompt_logprobs"),
    ):
        (row,) = read(tmp_path, batch_line(body, TEXT))
        assert row.error is not None and said in row.error


def test_a_file_for_run_batch(tmp_path: Path) -> None:
    """As OpenAI's and vLLM's documents write it: two chats, a completion, ids, with what asks for nothing."""
    chat = {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "messages": CHAT,
        "max_completion_tokens": 1000,
    }
    parts = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        }
    ]
    rows = read(
        tmp_path,
        b"\n".join(
            (
                batch_line(chat),
                batch_line(
                    {"messages": parts, "n": 3, "seed": 7, "max_tokens": 5, "temperature": 0.5, "stop": "x", "top_p": 1,
                     "frequency_penalty": 0, "stream": False, "user": "me", "logprobs": True, "top_logprobs": 4,
                     "min_tokens": 2, "midlogit": {"preset": "exploratory", "base_prompt": CHAT}},
                    custom_id="r2",
                    note="kept",
                ),
                batch_line({"prompt": "Once", "stop": ["x", "y"], "max_tokens": None}, TEXT, custom_id="r3"),
                batch_line({"prompt": [[5, 6]], "logprobs": 2, "max_tokens": 9}, TEXT, custom_id="r4"),
            )
        ),
    )  # fmt: skip
    assert [row.error for row in rows] == [None] * 4
    assert [row.row_id for row in rows] == ["r1", "r2", "r3", "r4"]
    assert [row.prompt for row in rows] == [
        CHAT,
        [{"role": "system", "content": "Be brief."}],
        "Once",
        [5, 6],
    ]
    assert [row.overrides for row in rows] == [
        {"max_tokens": 1000},
        {"n": 3, "seed": 7, "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "top_logprobs": 4, "min_tokens": 2,
         "preset": "exploratory"},
        {"stop": ["x", "y"]},
        {"max_tokens": 9, "top_logprobs": 2},
    ]  # fmt: skip
    assert (
        rows[1].base_prompt == CHAT
        and rows[1].carried == {"note": "kept"}
        and rows[0].carried == {}
    )
    assert with_overrides(SamplingParams(top_logprobs=5), rows[1].overrides).top_logprobs == 5
    with refused("asks for 4 top_logprobs, and the job reports 3"):
        with_overrides(SamplingParams(top_logprobs=3), rows[1].overrides)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (batch_line({"input": "a"}, "/v1/embeddings"), "url is '/v1/embeddings'. Use /v1/chat/completions or"),
        (batch_line({"messages": CHAT}, method="GET"), "method is 'GET'. Use POST"),
        (batch_line("x"), "body is no JSON object"),
        (batch_line({}), "messages: Field required"),
        (batch_line({"messages": []}), "messages: "),
        (batch_line({"messages": CHAT, "top_p": 0.9}), "cannot honour 'top_p'. .* midlogit.target_top_p"),
        (batch_line({"messages": CHAT, "tools": [{}]}), "cannot honour 'tools'"),
        (batch_line({"messages": CHAT, "colour": 1}), "Unknown option 'colour'"),
        (batch_line({"messages": CHAT, "n": 0}), "n: Input should be greater"),
        (batch_line({"messages": CHAT, "temperature": "hot"}), "temperature: "),
        (batch_line({"messages": [{"role": "tool", "content": "x"}]}), "role 'tool'"),
        (batch_line({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "type 'image_url'"),
        (batch_line({"messages": CHAT, "stream": True}), "'stream', which a job cannot honour"),
        (batch_line({"messages": CHAT, "chat_template_kwargs": 1}), "chat_template_kwargs"),
        (batch_line({"messages": CHAT, "midlogit": {"preset": "bold"}}), "'preset' is 'bold'"),
        (batch_line({"messages": CHAT, "midlogit": {"alpha_rule": "mid"}}), "'alpha_rule' is 'mid'"),
        (batch_line({"prompt": "a", "echo": True}, TEXT), "'echo'"),
        (batch_line({"prompt": ["a", "b"]}, TEXT), "2 prompts in 'prompt'"),
        (batch_line({"prompt": "a", "suffix": "b"}, TEXT), "'suffix'"),
        (batch_line({"messages": CHAT}, custom_id=None), "no 'custom_id'"),
    ],
)  # fmt: skip
def test_what_a_batch_line_cannot_have(tmp_path: Path, line: bytes, says: str) -> None:
    bad, good = read(tmp_path, line + b"\n" + batch_line({"messages": CHAT}))
    assert bad.error is not None and re.search(says, bad.error), bad.error
    assert good.error is None


def test_template_variables_must_be_those_of_the_job(tmp_path: Path) -> None:
    off = {"enable_thinking": False}
    (row,) = read(tmp_path, batch_line({"messages": CHAT, "chat_template_kwargs": off}))
    require_reading(Reading(chat_template_kwargs=off), row.overrides)
    require_reading(Reading(), {})
    assert with_overrides(SamplingParams(), row.overrides) == SamplingParams()
    for others in (None, {}, {"enable_thinking": True}, (off, {})):
        with refused("--chat-template-kwargs '{\"enable_thinking\": false}'"):
            require_reading(Reading(chat_template_kwargs=others), row.overrides)
