"""Chat templates as programs: the same text as transformers makes, and an end to those that have none."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from midlogit import InvalidRequest
from midlogit.models.checkpoint import Checkpoint, bundled
from midlogit.models.templates import TemplateFailed, TemplateProcess
from tests.variants import template, thinking, with_template

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße, 狐?\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Go on."},
]
TEMPLATES = (
    template(),
    thinking(template()),
    "{%- for m in messages %}\n  {%- if loop.last %}{% continue %}{% endif %}\n{{ m | tojson }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}|{% endfor %}",
    "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents }}{{ add_generation_prompt }}",
    "{{ dict(a=1) }}{{ messages[0].get('name', 'none') }}{{ messages[-1]['content'][::-1] }}",
    "{{ strftime_now('%Y-%m-%d') }}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages | length) }}",
)


@pytest.fixture(scope="module")
def process():
    process = TemplateProcess()
    yield process
    process.close()


@pytest.mark.parametrize("text", TEMPLATES)
def test_the_text_is_that_of_transformers(process: TemplateProcess, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled("teacher"))
    variables = {"enable_thinking": False, "tools": None, "documents": None}
    theirs = tokenizer.apply_chat_template(
        MESSAGES, chat_template=text, add_generation_prompt=True, tokenize=False, **variables
    )
    known = {"messages": MESSAGES, "add_generation_prompt": True, **tokenizer.special_tokens_map}
    assert process.render(text, {**known, **variables}) == theirs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for a in m %}{% for b in m %}{% for c in m %}{% for d in m %}{% endfor %}{% endfor %}"
         "{% endfor %}{% endfor %}", "more than 0.5 s"),
        ("{{ 9 ** (9 ** 9) }}", "more than 0.5 s"),
        ("{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(40) }}", "0.5 s"),
        ("{{ 'a' * 10 ** 12 }}", "more than 1,024 MiB"),
        ("{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
         "{% endfor %}", "more than"),
        ("{{ '%1000000000000d' | format(1) }}", "more than 1,024 MiB"),
        ("{{ 'a' | center(3 * 10 ** 7) }}", "more than 16,777,216 characters"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "16,777,216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ m", "unexpected end of template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('one\n  two') }}", "one two"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_would_never_end(
    process: TemplateProcess, text: str, says: str
) -> None:
    process.render("warm", {})
    with pytest.raises(TemplateFailed, match=says):
        process.render(text, {"m": list(range(2000))}, seconds=0.5 if "0.5 s" in says else 30)
    assert process.render("{{ a }}", {"a": 1}) == "1"


def test_the_model_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(with_template(tmp_path / "pair", "{{ 1 / 0 }}") / "teacher")
    with pytest.raises(InvalidRequest, match=r"chat template of .*teacher .*division by zero"):
        checkpoint.encode_chat(MESSAGES)
    with pytest.raises(InvalidRequest, match="no JSON value"):
        checkpoint.encode_chat(MESSAGES, {"now": object()})


def test_a_process_that_died_is_started_again_and_a_fork_has_its_own(
    process: TemplateProcess,
) -> None:
    assert process.render("a", {}) == "a"
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert process.render("b", {}) == "b"

    before = process._process
    process.leave_to_parent()
    assert process.render("c", {}) == "c" and process._process is not before
    before.kill()
    before.communicate()


def test_it_ends_with_its_parent() -> None:
    code = (
        "import os; from midlogit.models.templates import _renderer\n"
        "_renderer.render('a', {}); print(_renderer._process.pid, flush=True); os._exit(0)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    until = time.monotonic() + 30
    while Path(f"/proc/{int(said.stdout)}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
