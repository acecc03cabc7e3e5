"""TRL's unmodified server mode against `midlogit serve --train`; test_server.py runs it beside a stub of vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient

from midlogit import KLBudget, Pair, SamplingParams
from tests.trl.trainers import BASE, TEACHER, grpo

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers

IDS = [[5, 300, 7, 42], [11, 12, 2]]


@dataclass
class Rollouts:
    """What one call of the server answered, and the trainer's weights then."""

    weights: dict[str, torch.Tensor]
    prompt_ids: list[list[int]]
    token_ids: list[list[int]]
    logprobs: list[list[float]]


@dataclass
class Watched:
    """A trainer whose rollouts are kept."""

    trainer: GRPOTrainer
    rollouts: list[Rollouts] = field(default_factory=list)

    def __post_init__(self) -> None:
        generate = self.trainer.vllm_generation.generate

        def watched(*args: Any, **kwargs: Any) -> Any:
            answer = generate(*args, **kwargs)
            prompts, tokens, logprobs, _ = answer
            weights = deepcopy(self.trainer.model.state_dict())
            drawn = [[lp[0] for lp in row] for row in logprobs]
            self.rollouts.append(Rollouts(weights, list(prompts), list(tokens), drawn))
            return answer

        self.trainer.vllm_generation.generate = watched


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "midlogit", "serve", "--train", "--weights-root", str(root)]
    command += ["--port", "0", "--max-num-seqs", "32", "--dtype", "float32", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        while "ready: " not in log:
            line = process.stderr.readline()
            assert line, f"The server did not start:\n{log}"
            log += line
        yield re.findall(r"ready: (http://\S+)", log)[0]
        process.terminate()
        process.stderr.read()


@pytest.fixture
def client(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> VLLMClient:
    """TRL's client, which refuses other devices than CUDA although none is touched here."""
    monkeypatch.setenv("MIDLOGIT_WEIGHTS_ROOT", str(root))
    init = VLLMClient.init_communicator
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: init(self, "cuda"))
    return VLLMClient(base_url=url)


def test_every_call_of_the_client_answers(client: VLLMClient) -> None:
    assert client.get_server_info()["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert client.get_world_size() == 1

    found = client.generate(IDS, n=2, max_tokens=6)
    assert found["prompt_ids"] == IDS
    for tokens, logprobs, ids in zip(
        found["completion_ids"], found["logprobs"], found["logprob_token_ids"], strict=True
    ):
        assert [[token] for token in tokens] == ids
        assert len(logprobs) == len(tokens) <= 6 and all(lp[0] < 0 for lp in logprobs)
    assert len(found["completion_ids"]) == 4
    assert client.generate(IDS, logprobs=None)["logprobs"] is None

    options = {"midlogit": {"preset": "exploratory", "alpha_rule": "kl-budget:0.05"}}
    assert client.generate(IDS, generation_kwargs=options)["completion_ids"]
    chat = [[{"role": "user", "content": "Tell me a story."}]]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for logprobs in (0, None):
        told = client.chat(chat, n=2, max_tokens=4, logprobs=logprobs)
        assert len(told["completion_ids"]) == 2 and (told["logprobs"] is None) == (logprobs is None)
    assert tokenizer.decode(told["prompt_ids"][0]).endswith("Answer:")

    many = client.generate([[5 + k, 6, 7] for k in range(100)], n=4, max_tokens=2)
    assert len(many["completion_ids"]) == 400
    client.reset_prefix_cache()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("top_p", {"top_p": 0.9}),
        ("top_k", {"top_k": 5}),
        ("min_p", {"min_p": 0.1}),
        ("repetition_penalty", {"repetition_penalty": 1.1}),
        ("structured_outputs", {"structured_outputs_regex": "[a-z]+"}),
        ("no_such", {"generation_kwargs": {"no_such": 1}}),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(
    client: VLLMClient, name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(Exception, match=rf"400.*{name}"):
        client.generate(IDS, **options)


@pytest.mark.parametrize("side", ["base", "teacher"])
def test_log_probabilities_of_each_model_for_distillation(
    client: VLLMClient, url: str, side: str
) -> None:
    alone = VLLMClient(base_url=f"{url}/{side}")
    rows = [[5, 300, 7, 42, 1, 9], [11, 12, 2, 3]]
    found = alone.get_sequence_logprobs(rows, [2, 1], top_logprobs=3, temperature=0.8)

    model = AutoModelForCausalLM.from_pretrained({"base": BASE, "teacher": TEACHER}[side]).float()
    for n, (row, start) in enumerate(zip(rows, [2, 1], strict=True)):
        with torch.inference_mode():
            logprobs = (model(torch.tensor([row])).logits[0] / 0.8).log_softmax(-1)
        for k, at in enumerate(range(start, len(row))):
            wanted = logprobs[at - 1]
            assert found["actual_token_ids"][n][k] == [row[at]]
            assert found["actual_logprobs"][n][k][0] == pytest.approx(
                wanted[row[at]].item(), abs=1e-4
            )
            top = wanted.topk(3)
            assert found["logprob_token_ids"][n][k] == top.indices.tolist()
            assert found["logprobs"][n][k] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_a_trainer_reads_log_q_under_its_weights_of_the_moment(
    client: VLLMClient, url: str, tmp_path: Path
) -> None:
    budget = "kl-budget:0.05"
    watched = Watched(
        grpo(
            tmp_path,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=url,
            learning_rate=1e-3,
            generation_kwargs={"midlogit": {"alpha_rule": budget}},
        )
    )
    watched.trainer.train()

    assert len(watched.rollouts) == 3
    first, *_, last = (r.weights["model.embed_tokens.weight"] for r in watched.rollouts)
    assert not torch.equal(first, last)
    params = SamplingParams.preset("rollout", max_tokens=24, alpha_rule=KLBudget(0.05))
    for rollouts in watched.rollouts:
        assert largest_error(rollouts, params) < 1e-4


def largest_error(rollouts: Rollouts, params: SamplingParams) -> float:
    """The largest difference of the served log-probabilities from log q under the trainer's weights then."""
    model = AutoModelForCausalLM.from_pretrained(BASE).float()
    model.load_state_dict(rollouts.weights)
    texts = [p + t for p, t in zip(rollouts.prompt_ids, rollouts.token_ids, strict=True)]
    with Pair.local(
        model, TEACHER, base_tokenizer=AutoTokenizer.from_pretrained(BASE), dtype="float32"
    ) as pair:
        scored = pair.score(texts, params)
    return max(
        abs(served - wanted)
        for logprobs, scores in zip(rollouts.logprobs, scored, strict=True)
        for served, wanted in zip(
            logprobs, scores.diagnostics.logprobs[-len(logprobs) :], strict=True
        )
    )
