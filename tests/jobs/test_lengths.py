"""Restarts do not favour short completions: what is redrawn is drawn with the same uniforms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from scipy.stats import ks_2samp
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from midlogit.jobs import Job, JobOptions, PairSource
from midlogit.pair import Pair
from midlogit.params import SamplingParams

ROWS, LONGEST, STEPS = 2000, 24, 28


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PairSource:
    """Two random models of 14 ids that nearly agree, so that lengths are nearly geometric with a mean of 14."""
    folder = tmp_path_factory.mktemp("letters")
    letters = list("abcdefgh 0123")
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([AddedToken("<end>")])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    for seed, side in enumerate(("base", "teacher")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(letters) + 1,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=len(letters),
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / side)
        fast.save_pretrained(folder / side)
    options = {"device": "cpu", "max_num_seqs": 128, "speculation": "off"}
    return PairSource("local", folder / "base", folder / "teacher", options)


@pytest.fixture(scope="module")
def pair(source: PairSource) -> Iterator[Pair]:
    with source.open() as opened:
        yield opened


@pytest.fixture
def job(source: PairSource, tmp_path: Path) -> Job:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {n % 4}"}) + "\n" for n in range(ROWS)))
    params = SamplingParams.preset("exploratory", max_tokens=LONGEST)
    return Job.plan([rows], tmp_path / "run", source, JobOptions(params, diagnostics="none"))


def lengths(job: Job) -> list[int]:
    return [n for t in job.tables(["completion_tokens"]) for n in t.column(0).to_pylist()]


def run_with_stops(job: Job, pair: Pair, *, fresh: bool) -> int:
    """Runs a job that is stopped every STEPS steps of the engine, with the number of stops.

    Args:
        fresh: draw what is redrawn with another seed, as other tools do.
    """
    manifest, step = job.manifest, pair.engine.step
    steps: list[None] = []

    def counted() -> None:
        steps.append(None)
        step()

    pair.engine.step = counted
    for stops in range(100):
        if fresh:
            sampling = {**manifest.parameters["sampling"], "seed": 1000 + stops}
            job.manifest = replace(
                manifest, parameters={**manifest.parameters, "sampling": sampling}
            )
        steps.clear()
        if job.run(pair, should_stop=lambda: len(steps) >= STEPS):
            pair.engine.step = step
            return stops
    raise AssertionError("it does not get on")


def test_lengths_are_those_of_an_uninterrupted_run(
    job: Job, pair: Pair, source: PairSource, tmp_path: Path
) -> None:
    assert run_with_stops(job, pair, fresh=False) >= 3
    whole = Job.plan([tmp_path / "prompts.jsonl"], tmp_path / "whole", source, options_of(job))
    assert whole.run(pair)
    redrawn = Job.plan([tmp_path / "prompts.jsonl"], tmp_path / "fresh", source, options_of(job))
    assert run_with_stops(redrawn, pair, fresh=True) >= 3
    assert ks_2samp(lengths(job), lengths(whole)).pvalue > 0.5
    assert ks_2samp(lengths(redrawn), lengths(whole)).pvalue < 1e-3


def options_of(job: Job) -> JobOptions:
    return JobOptions(job.manifest.params, diagnostics="none")
