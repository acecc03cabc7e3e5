"""What a user can get wrong through the Python API: typed errors before any work, and broken rows that stay alone."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from midlogit import (
    EngineFailure,
    FixedAlpha,
    Interrupted,
    InvalidRequest,
    KLBudget,
    ModelUnavailable,
    Pair,
    PairMismatch,
    PromptTooLong,
    SamplingParams,
    parse_rule,
)
from tests.conftest import BASE, TEACHER
from tests.questions import QUESTIONS

PARAMS = SamplingParams.preset("balanced", max_tokens=12, seed=7, ignore_eos=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. It must be at least 1."),
        ({"n": 0}, "n is 0"),
        ({"min_tokens": 300}, "between 0 and max_tokens (256)"),
        ({"temperature": -0.1}, "temperature is -0.1. It must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"target_top_p": 0.0}, "target_top_p is 0.0. It must lie in (0, 1]."),
        ({"target_top_p": 1.1}, "(0, 1]"),
        ({"top_logprobs": 257}, "0 to 256"),
        ({"alpha_tol": 0.0}, "alpha_tol"),
        ({"stop": ("",)}, "stop string is empty"),
        ({"alpha_rule": "equal-kl"}, "parse_rule"),
        ({"max_tokens": "8"}, "max_tokens is '8'. It must be a whole number."),
        ({"max_tokens": 2.5}, "max_tokens is 2.5. It must be a whole number."),
        ({"n": True}, "n is True. It must be a whole number."),
        ({"seed": 1.5}, "seed is 1.5. It must be a whole number."),
        ({"top_logprobs": None}, "top_logprobs is None. It must be a whole number."),
        ({"temperature": "1"}, "temperature is '1'. It must be a number."),
        ({"ignore_eos": 1}, "ignore_eos is 1. It must be True or False."),
        ({"stop": 3}, "stop is 3. It must be a list of strings."),
        ({"stop": [3]}, "stop is [3]. It must be a list of strings."),
        ({"stop_token_ids": 3}, "stop_token_ids is 3. It must be a list of ids."),
        ({"stop_token_ids": ["<|end|>"]}, "It must be a list of ids."),
    ],
)
def test_parameters_out_of_range(changes, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**changes)
    assert says in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_numbers_of_other_libraries_are_numbers() -> None:
    params = SamplingParams(
        max_tokens=np.int64(8), temperature=np.float32(0.5), stop_token_ids=np.arange(3)
    )
    assert params.max_tokens == 8 and params.stop_token_ids == (0, 1, 2)


@pytest.mark.parametrize("rule", [FixedAlpha, KLBudget])
def test_rules_take_numbers(rule: type) -> None:
    with pytest.raises(InvalidRequest, match="It must be a number"):
        rule("0.3")


def test_any_iterable_is_read_once() -> None:
    params = SamplingParams(stop=(text for text in ("a", "b")), stop_token_ids=iter([3, 4]))
    assert params.stop == ("a", "b") and params.stop_token_ids == (3, 4)


def test_unknown_preset_and_rule_name_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens is '8'"):
        SamplingParams.preset("rollout", max_tokens="8")
    with pytest.raises(InvalidRequest, match="conservative, balanced, exploratory"):
        SamplingParams.preset("bold")
    for spec in ("middle", "fixed", "fixed:x", "kl-budget:", "equal-kl:1"):
        with pytest.raises(InvalidRequest, match="equal-kl, fixed:ALPHA"):
            parse_rule(spec)
    with pytest.raises(InvalidRequest, match=r"\[0, 1\]"):
        parse_rule("fixed:1.5")
    with pytest.raises(InvalidRequest, match="nats"):
        parse_rule("kl-budget:-1")
    assert parse_rule("kl-budget:0.25").spec == "kl-budget:0.25"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [""]}, "base prompt 0 is empty"),
        ({"prompts": ["a", []]}, "prompt 1 is empty"),
        ({"prompts": "text"}, "must come as a list"),
        ({"prompts": [3.5]}, "no known form"),
        ({"prompts": [[1, "a"]]}, "no known form"),
        ({"prompts": [[{"role": "user"}]]}, "lacks a role or content"),
        ({"prompts": [[999_999]]}, "ids outside 0 to"),
        ({"base_prompts": ["a"]}, "no prompt for one side"),
        (
            {"base_prompts": ["a"], "teacher_prompts": ["a", "b"]},
            "1 base prompts and 2 teacher prompts",
        ),
        (
            {"prompts": ["a"], "params": SamplingParams(special_token_ids=(10**6,))},
            "special_token_ids holds 1000000",
        ),
    ],
)
def test_prompts_that_cannot_be_used(pair: Pair, call, says: str) -> None:
    before = pair.statistics()
    with pytest.raises(InvalidRequest, match=says):
        pair.generate(**call)
    assert pair.statistics() == before


def test_a_prompt_longer_than_a_context_window_stops_the_call_before_it_runs(pair: Pair) -> None:
    limit = pair.mixing.base.max_context
    before = pair.statistics()
    with pytest.raises(
        PromptTooLong,
        match=f"base prompt 1 has {limit + 10} tokens, the base's context window {limit}",
    ):
        pair.generate(
            base_prompts=["a", [5] * (limit + 10)], teacher_prompts=["a", "b"], params=PARAMS
        )
    with pytest.raises(PromptTooLong, match="teacher prompt 0"):
        pair.generate(base_prompts=["a"], teacher_prompts=[[5] * limit], params=PARAMS)
    assert pair.statistics() == before


def test_a_stream_is_one_completion(pair: Pair) -> None:
    with pytest.raises(InvalidRequest, match="one completion"):
        next(iter(pair.stream("a", SamplingParams(n=2))))


def test_models_that_are_not_there_or_not_causal(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="no model folder"):
        Pair.local(tmp_path / "nothing", TEACHER)
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json"):
        Pair.local(tmp_path, TEACHER)
    encoder = tmp_path / "encoder"
    shutil.copytree(BASE, encoder)
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 4096}
    (encoder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match=r"not a causal language model \(BertForMaskedLM\)"):
        Pair.local(encoder, TEACHER)
    weightless = tmp_path / "weightless"
    shutil.copytree(BASE, weightless)
    (weightless / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"weights of .* cannot be loaded"):
        Pair.local(weightless, TEACHER)
    with pytest.raises(InvalidRequest, match="Only one"):
        Pair.local(BASE)


def test_unknown_devices_dtypes_and_sizes() -> None:
    with pytest.raises(InvalidRequest, match="'gpu7' cannot be used"):
        Pair.local(device="gpu7")
    with pytest.raises(InvalidRequest, match="Unknown dtype 'int8'"):
        Pair.local(dtype="int8", device="cpu")
    for number, says in (
        (0, "is 0"),
        ("8", "is '8'. It must be a whole"),
        (2.5, "is 2.5. It must"),
    ):
        with pytest.raises(InvalidRequest, match=f"max_num_seqs {says}"):
            Pair.local(max_num_seqs=number)


def change_tokens(folder: Path, how_many: int) -> None:
    """Renames that many ordinary tokens of a tokenizer."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    merges = tokenizer["model"]["merges"]
    for token in [t for t, i in vocabulary.items() if i > 3000][:how_many]:
        vocabulary[token + "~"] = vocabulary.pop(token)
        merges = [m for m in merges if "".join(m) != token and token not in m]
    tokenizer["model"]["merges"] = merges
    file.write_text(json.dumps(tokenizer))


def test_tokenizers_that_disagree(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    change_tokens(base, 20)
    with Pair.local(base, TEACHER, device="cpu") as pair:
        differing = set(pair.mixing.alignment.differing)
        assert len(differing) == 20
        params = SamplingParams.preset(
            "exploratory", max_tokens=20, seed=1, ignore_eos=True, temperature=1.5
        )
        found = pair.generate(QUESTIONS, params, chat=True)
        assert not differing & {i for c in found for i in c.token_ids}
    change_tokens(base, 100)
    with pytest.raises(PairMismatch, match=r"shared ids differ .*'.*' / '") as caught:
        Pair.local(base, TEACHER, device="cpu")
    assert "one tokenizer" in caught.value.hint


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled base with NaN in the embedding of one id."""
    folder = tmp_path_factory.mktemp("models") / "poisoned"
    shutil.copytree(BASE, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[1234] = float("nan")
    model.save_pretrained(folder)
    return folder


def test_nan_logits_end_their_request_alone(poisoned: Path, pair: Pair) -> None:
    """Not the rows beside it, nor those that take its place in the cache."""
    prompts = [[700 + i] * 6 for i in range(8)]
    prompts[2] = [1234, *prompts[2]]
    with Pair.local(poisoned, TEACHER, dtype="float32", device="cpu", max_num_seqs=3) as broken:
        found = broken.generate(prompts, PARAMS)
        expected = pair.generate([[700 + i] * 6 for i in range(8)], PARAMS)
        assert found[2].finish_reason == "error" and found[2].token_ids == []
        assert "Request 2, position 0" in (found[2].error or "") and "NaN" in (found[2].error or "")
        for i in (0, 1, 3, 4, 5, 6, 7):
            assert found[i].token_ids == expected[i].token_ids
        statistics = broken.statistics()
        assert (statistics["total_requests"], statistics["failed_requests"]) == (8, 1)
        assert statistics["success_rate"] == pytest.approx(7 / 8)


def test_an_engine_that_dies_returns_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair.local(dtype="float32", device="cpu", speculation="off") as pair:
        steps = iter(range(5))
        advance = pair.engine.base.advance

        def fail_later(tokens):
            if next(steps, None) is None:
                raise RuntimeError("the device is gone")
            return advance(tokens)

        monkeypatch.setattr(pair.engine.base, "advance", fail_later)
        found = pair.generate(QUESTIONS[:3], PARAMS, chat=True)
        assert [c.finish_reason for c in found] == ["error"] * 3
        assert all(
            len(c.token_ids) == 6 and c.text and "the device is gone" in (c.error or "")
            for c in found
        )
        with pytest.raises(EngineFailure, match="the device is gone"):
            pair.generate(QUESTIONS[:1], PARAMS, chat=True)


def test_interrupting_a_batch_keeps_what_was_finished(pair: Pair) -> None:
    """Ctrl-C in the middle: finished completions whole, the others with what they had.

    Another thread than the waiting one receives the signal, so that nothing but the wait itself can notice it.
    """
    lengths = [2, 900, 3, 900]
    prompts = [[800 + i] * (pair.mixing.base.max_context - room) for i, room in enumerate(lengths)]
    params = SamplingParams.preset("balanced", max_tokens=900, seed=1, ignore_eos=True)

    before = pair.statistics()["total_requests"]

    def interrupt() -> None:
        while pair.statistics()["total_requests"] < before + 2:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted) as caught:
        pair.generate(prompts, params)
    found = caught.value.completions
    assert [c.index for c in found] == [0, 1, 2, 3]
    assert [c.finish_reason for c in found] == ["length", "abort", "length", "abort"]
    assert all(c.token_ids for c in found)


def test_interrupting_scores_drops_what_waits(pair: Pair) -> None:
    def interrupt() -> None:
        while not pair.engine.num_live:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        pair.score([[700] * 900] * 200)
    pair.generate(QUESTIONS[:1], replace(PARAMS, max_tokens=1))
    assert pair.engine.num_live <= 1  # nothing but what has just ended


def test_a_closed_pair_says_so() -> None:
    pair = Pair.local(device="cpu")
    pair.close()
    pair.close()
    with pytest.raises(EngineFailure, match="closed"):
        pair.generate(["a"])


def test_a_missing_extra_names_the_pip_line() -> None:
    """In a Python that cannot import transformers."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from midlogit import Pair, MissingExtra\n"
        "try: Pair.local()\n"
        "except MissingExtra as error: print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install 'midlogit[local]'" in said
