"""Models of different width: a stop id that only one has ends texts, and padding that holds mass is counted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
import transformers

from midlogit import Pair, PairMismatch, SamplingParams
from midlogit.cli.doctor import run_doctor
from midlogit.cli.loading import PairOptions
from tests import wider
from tests.variants import edit

PROMPTS = ["Tell me a story.", "Who is there?", "Once upon a time", "What is a fox?"]
PARAMS = SamplingParams(max_tokens=200, seed=1, n=4)


def ended(pair: Pair) -> tuple[float, float]:
    """The share of 16 completions that end by a stop, and their mean length."""
    found = pair.generate(PROMPTS, PARAMS, chat=True, progress=False)
    stops = [completion for completion in found if completion.finish_reason == "stop"]
    return len(stops) / len(found), sum(len(completion.token_ids) for completion in found) / len(
        found
    )


@pytest.fixture(scope="module")
def own_stop(tmp_path_factory) -> tuple[Path, Path]:
    return wider.with_own_stop(tmp_path_factory.mktemp("own-stop"))


@pytest.mark.parametrize("speculation", ["off", 3])
def test_a_stop_id_of_the_teacher_alone_ends_texts(pair: Pair, own_stop, speculation) -> None:
    share, length = ended(pair)
    with Pair.local(*own_stop, dtype="float32", device="cpu", speculation=speculation) as altered:
        stop_id = altered.mixing.alignment.size
        assert altered.mixing.stop_ids == (0, stop_id)
        found = altered.generate(PROMPTS, PARAMS, chat=True, progress=False)
    stops = [completion for completion in found if completion.finish_reason == "stop"]
    assert abs(len(stops) / len(found) - share) <= 0.25
    assert sum(len(completion.token_ids) for completion in found) / len(found) < 2 * length
    for completion in stops:
        # The teacher's own stop id is its likeliest, and its mass is that of the class.
        assert completion.token_ids[-1] == stop_id and wider.OWN_STOP not in completion.text
        assert (
            completion.diagnostics.teacher_logprobs[-1] > -5
            and completion.diagnostics.base_logprobs[-1] > -5
        )


def test_a_stop_id_of_the_base_alone_ends_texts(pair: Pair, tmp_path: Path) -> None:
    share, _ = ended(pair)
    with Pair.local(
        *wider.with_own_stop(tmp_path, "base"), dtype="float32", device="cpu"
    ) as altered:
        found = altered.generate(PROMPTS, PARAMS, chat=True, progress=False)
    stops = [completion for completion in found if completion.finish_reason == "stop"]
    assert abs(len(stops) / len(found) - share) <= 0.25
    assert {completion.token_ids[-1] for completion in stops} == {1}


def test_streams_ignore_eos_and_unmerged_stops(own_stop) -> None:
    with Pair.local(*own_stop, dtype="float32", device="cpu") as altered:
        *tokens, completion = altered.stream(PROMPTS[0], replace(PARAMS, n=1), chat=True)
        assert [token.token_id for token in tokens] == completion.token_ids
        assert "".join(token.text for token in tokens) == completion.text
        on = replace(PARAMS, n=1, max_tokens=40, ignore_eos=True)
        assert {
            len(c.token_ids) for c in altered.generate(PROMPTS, on, chat=True, progress=False)
        } == {40}
        apart = replace(on, ignore_eos=False, merge_stop_ids=False)
        assert all(
            max(c.token_ids) < altered.mixing.alignment.size
            for c in altered.generate(PROMPTS, apart, chat=True, progress=False)
        )


def test_doctor_names_a_stop_id_of_one_model(own_stop, capsys) -> None:
    assert run_doctor(PairOptions(*map(str, own_stop)), "auto") == 0
    out = capsys.readouterr().out
    stop = next(line for line in out.splitlines() if line.startswith("stop"))
    special = next(line for line in out.splitlines() if line.startswith("special"))
    assert "4096" in stop and "of the teacher alone" in stop and "4096" not in special


def test_a_class_that_one_model_cannot_draw_is_refused(own_stop, tmp_path: Path) -> None:
    base, teacher = own_stop
    without = tmp_path / "base"
    copytree(base, without)
    edit(without / "tokenizer_config.json", lambda data: data.pop("eos_token"))
    for name in ("config.json", "generation_config.json"):
        edit(without / name, lambda data: data.pop("eos_token_id", None))
    with pytest.raises(PairMismatch, match="id 4096, which the base does not have"):
        Pair.local(without, teacher, dtype="float32", device="cpu")


@torch.inference_mode()
def test_padding_that_holds_mass_is_the_models_own(tmp_path: Path) -> None:
    """`base_logprobs` are those of plain transformers over all rows, padding included (docs/theory.md (20))."""
    folders = wider.with_heavy_padding(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folders[0], dtype=torch.float32
    ).eval()
    with Pair.local(*folders, dtype="float32", device="cpu") as pair:
        size = pair.mixing.alignment.size
        params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True, top_logprobs=3)
        (completion,) = pair.generate(PROMPTS[:1], params)
        (scores,) = pair.score(PROMPTS[:1], SamplingParams.preset("exploratory"))
        prompt = pair.mixing.base.encode(PROMPTS[0])
    rows = plain(torch.tensor([prompt + completion.token_ids])).logits[0].log_softmax(-1)
    assert rows[:, size:].exp().sum(-1).mean() > 0.02
    own = [float(rows[len(prompt) - 1 + k, i]) for k, i in enumerate(completion.token_ids)]
    assert all(
        math.isclose(a, b, abs_tol=1e-4)
        for a, b in zip(completion.diagnostics.base_logprobs, own, strict=True)
    )
    assert all(
        math.isclose(top.base[0][1], float(rows[len(prompt) - 1 + k].max()), abs_tol=1e-4)
        for k, top in enumerate(completion.top)
    )
    given = [float(rows[k, i]) for k, i in enumerate(prompt[1:])]
    assert all(
        math.isclose(a, b, abs_tol=1e-4)
        for a, b in zip(scores.diagnostics.base_logprobs, given, strict=True)
    )
