"""Bodies made up from two tables: what asks for nothing passes at every depth, what asks for something is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midlogit.messages import ANY
from midlogit.server.wire.options import OPTIONS
from midlogit.server.wire.requests import ChatBody, CompletionBody, TokenizeBody
from tests.server.conftest import Live

COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
ID = "7d1f"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Once", "max_tokens": 1},
    CHAT: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_tokens": 1,
    },
    TOKENIZE: {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
}
# The defaults of OpenAI's and vLLM's bodies, and what clients send besides, all of which asks for nothing.
# Keys are paths; 0 is the first of a list.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "model": ("midlogit", ""),
    "n": (1,),
    "temperature": (1, 1.0),
    "stop": ([], [None]),
    "stop_token_ids": ([], [None]),
    "stream": (False,),
    "stream_options": (
        {},
        {"include_usage": False},
        {"include_usage": None, "continuous_usage_stats": False},
    ),
    "stream_options.include_obfuscation": (True, False),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1.0,),
    "logit_bias": ({}, {"5": None}),
    "top_p": (1, 1.0),
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "bad_words": ([],),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "watermarking": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "response_format": ({"type": "text"}, {"type": "text", "json_schema": None}),
    "truncation_side": ("left", "right"),
    "thinking_token_budget": (-1,),
    "stream_interval": (1,),
    "return_token_offsets": (False,),
    "return_mm_kwargs": (False,),
    "routed_experts_prompt_start": (0,),
    "mm_payload": ("tensors",),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "priority": (0,),
    "request_id": (ID,),
    "session_id": (ID,),
    "user": (ID,),
    "metadata": ({}, {"job": ID}),
    "midlogit": ({},),
    "midlogit.diagnostics": (False,),
    "midlogit.base_chat_template_kwargs": ({}, {"enable_thinking": None}),
}
TEMPLATE: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": (
        {},
        {"enable_thinking": None},
        {"enable_thinking": False, "add_generation_prompt": True},
    ),
    "tools": ([],),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "messages.0.type": ("text", "message"),
    "messages.0.name": ("", "Ann"),
    "messages.0.id": (ID,),
    "messages.0.tool_calls": ([], [None]),
    "messages.0.function_call": ({}, {"name": None}),
    "messages.0.tool_call_id": ("",),
    "messages.0.refusal": ("",),
    "messages.0.annotations": ([],),
    "messages.0.audio": ({"id": None},),
    "messages.0.reasoning": ("",),
    "messages.0.reasoning_content": ("",),
    "messages.0.prefix": (False,),
    "messages.0.cache_control": ({"type": "ephemeral"},),
    "messages.0.content.0.type": ("text", "input_text", "output_text"),
    "messages.0.content.0.cache_control": ({"type": "ephemeral"},),
    "messages.0.content.0.prompt_cache_breakpoint": ({"mode": "explicit"},),
    "messages.0.content.0.annotations": ([],),
}
NOTHING: dict[str, dict[str, tuple[Any, ...]]] = {
    COMPLETIONS: SAMPLING
    | {
        "add_special_tokens": (True,),
        "echo": (False,),
        "suffix": ("",),
        "chat_template_kwargs": ({},),
    },
    CHAT: SAMPLING
    | TEMPLATE
    | {
        "echo": (False,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "include_reasoning": (True,),
        "return_prompt_text": (False,),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "safety_identifier": (ID,),
        "prompt_cache_key": (ID,),
        "prompt_cache_options": ({"mode": "implicit"},),
        "prompt_cache_retention": ("in_memory",),
    },
    TOKENIZE: TEMPLATE | {"return_token_strs": (False,)},
}
# Fields of which null alone asks for nothing; with what each may ask for.
SOMETHING: dict[str, dict[str, Any]] = {
    COMPLETIONS: {
        **dict.fromkeys(("best_of", "frequency_penalty", "repetition_penalty", "top_k"), 2),
        "truncate_prompt_tokens": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "logit_bias": {"5": 1},
        "suffix": "end",
        "allowed_token_ids": [5],
        "bad_words": ["x"],
        "use_beam_search": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "response_format": {"type": "json_object"},
        "structured_outputs": {"choice": ["a"]},
        "guided_json": {},
        "prompt_embeds": "AA==",
        "cache_salt": ID,
        "repetition_detection": {"max": 5},
        "chat_template_kwargs": {"enable_thinking": False},
        "made_up": 1,
        "midlogit.base_chat_template_kwargs": {"enable_thinking": False},
    },
    CHAT: {
        "prompt_logprobs": 1,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
        "functions": [{"name": "f"}],
        "function_call": {"name": "f"},
        "reasoning_effort": "high",
        "verbosity": "low",
        "echo": True,
        "add_special_tokens": True,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template": "{{ messages }}",
        "documents": [{"text": "x"}],
        "modalities": ["text", "audio"],
        "audio": {"voice": "x"},
        "prediction": {"type": "content", "content": "x"},
        "web_search_options": {},
        "moderation": {"model": "x"},
        "store": True,
        "chat_template_kwargs.chat_template": "x",
        "chat_template_kwargs.tokenize": True,
        "messages.0.tool_calls": [{"id": "1", "type": "function"}],
        "messages.0.function_call": {"name": "f"},
        "messages.0.role": "tool",
        "messages.0.refusal": "No.",
        "messages.0.audio": {"id": "1"},
        "messages.0.reasoning_content": "Hm.",
        "messages.0.prefix": True,
        "messages.0.made_up": 1,
        "messages.0.content.0.made_up": 1,
    },
    TOKENIZE: {
        "tools": [{"type": "function"}],
        "chat_template": "x",
        "messages.0.tool_calls": [{}],
        "made_up": 1,
    },
}
WRONG: dict[str, Any] = {
    "messages.0.role": "wizard",
    "messages.0.name": 5,
    "messages.0.content": 5,
    "messages.0.content.0": 5,
    "messages.0.content.0.type": "image_url",
    "messages.0.content.0.text": 5,
    "chat_template_kwargs": "x",
    "midlogit.made_up": 1,
    "stream_options.made_up": 1,
}
NULLS = (
    "midlogit.preset",
    "midlogit.alpha_rule",
    "seed",
    "made_up",
    "messages.0.made_up",
    "messages.0.content.0.made_up",
)


def put(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the body with a value at a path, objects on the way made where there are none."""
    found = copy.deepcopy(body)
    *way, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inner: Any = found
    for part in way:
        if isinstance(inner, dict):
            inner.setdefault(part, {})
        inner = inner[part]
    inner[last] = value
    return found


def test_the_tables_hold_every_field() -> None:
    """Every field of midlogit's own bodies, and of those that it knows and does not support."""
    tested = {
        path.split(".")[0] for table in (*NOTHING.values(), *SOMETHING.values()) for path in table
    }
    own = {*CompletionBody.model_fields, *ChatBody.model_fields, *TokenizeBody.model_fields}
    asking = {"prompt", "messages", "max_tokens", "max_completion_tokens", "seed"}
    assert own - asking <= tested
    untested = set(OPTIONS) - tested - {"guided_choice", "guided_grammar", "guided_regex"}
    assert not untested
    assert all(value is ANY or isinstance(value, tuple) for value in OPTIONS.values())


@pytest.mark.parametrize("path", list(BODIES))
def test_each_value_that_asks_for_nothing(server: Live, path: str) -> None:
    refused = {}
    for field, values in NOTHING[path].items():
        for value in values:
            response = server.post(path, put(BODIES[path], field, value))
            if response.status_code != 200:
                refused[field, str(value)] = response.json()["error"]["message"]
    assert not refused
    body = BODIES[path]
    for field in sorted(NOTHING[path], key=lambda field: -field.count(".")):
        body = put(body, field, None)
    assert server.post(path, body).status_code == 200


@pytest.mark.parametrize("path", list(BODIES))
def test_values_that_ask_for_nothing_together(server: Live, path: str) -> None:
    """Any of them together, at every depth, change nothing of the answer."""
    table = NOTHING[path] | {
        null: (None,) for null in NULLS if path != COMPLETIONS or not null.startswith("messages")
    }
    if path == TOKENIZE:
        table = {
            field: values for field, values in table.items() if not field.startswith("midlogit")
        }
    chosen = st.fixed_dictionaries(
        {}, optional={field: st.sampled_from(values) for field, values in table.items()}
    )
    plain = answer_of(server, path, BODIES[path])

    @given(fields=chosen)
    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def one(fields: dict[str, Any]) -> None:
        body = BODIES[path]
        # Shallow fields first: `stream_options` before `stream_options.include_obfuscation`.
        for field in sorted(fields, key=lambda f: (f.count("."), f)):
            if fields[field] is not None or field in NULLS:
                body = put(body, field, fields[field])
        assert answer_of(server, path, body) == plain

    one()


def answer_of(server: Live, path: str, body: dict[str, Any]) -> Any:
    """The part of an answer that does not depend on chance."""
    response = server.post(path, body)
    assert response.status_code == 200, (body, response.text)
    data = response.json()
    return data if path == TOKENIZE else (data["usage"]["prompt_tokens"], data["choices"][0].keys())


@pytest.mark.parametrize("path", list(BODIES))
def test_what_asks_for_something_is_named(server: Live, path: str) -> None:
    for field, value in SOMETHING[path].items():
        response = server.post(path, put(BODIES[path], field, value))
        assert response.status_code in (400, 422), (field, response.text)
        error = response.json()["error"]
        unsupported = path != TOKENIZE or field != "add_special_tokens"
        assert (error["param"], response.status_code) == (field, 400 if unsupported else 422), error
        assert field.split(".")[-1] in error["message"]


def test_what_is_wrong_is_named(server: Live) -> None:
    for field, value in WRONG.items():
        response = server.post(CHAT, put(BODIES[CHAT], field, value))
        assert response.status_code == 422, (field, response.text)
        assert response.json()["error"]["param"] == field
    server.wait_idle()
