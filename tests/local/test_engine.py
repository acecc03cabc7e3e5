"""The local engine against plain transformers, in every batch, with every way to end."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from midlogit import Completion, EqualKL, FixedAlpha, KLBudget, Pair, SamplingParams, Token
from midlogit.core import reference
from midlogit.engines.stepping import USUAL_THRESHOLDS, SteppingEngine
from tests.conftest import BASE, TEACHER
from tests.questions import QUESTIONS


def params(**changes) -> SamplingParams:
    return SamplingParams.preset("balanced", **{"max_tokens": 24, "seed": 7, **changes})


@torch.inference_mode()
def plain_greedy(
    models, pair: Pair, prompt: str, preset: SamplingParams
) -> tuple[list[int], list[float]]:
    """(tokens, α) of greedy q* by whole forwards without a cache and the float64 reference."""
    mixing = pair.mixing
    message = [{"role": "user", "content": prompt}]
    contexts = [mixing.base.encode_chat(message), mixing.teacher.encode_chat(message)]
    stop_ids = mixing.stop_ids
    tokens: list[int] = []
    alphas: list[float] = []
    while len(tokens) < preset.max_tokens and (not tokens or tokens[-1] not in stop_ids):
        base, teacher = (
            model(torch.tensor([context + tokens])).logits[0, -1].double().tolist()
            for model, context in zip(models, contexts, strict=True)
        )
        found = reference.mixture(
            base,
            teacher,
            masked_ids=mixing.special_ids,
            stop_ids=stop_ids,
            top_p=preset.target_top_p if preset.constraint_to_target else None,
            forced=preset.force_first_token and not tokens,
        )
        token = max(range(len(found.q)), key=found.q.__getitem__)
        tokens.append(max(stop_ids, key=teacher.__getitem__) if token in stop_ids else token)
        alphas.append(found.alpha)
    return tokens, alphas


@pytest.mark.parametrize("preset", ["balanced", "exploratory"])
def test_greedy_equals_plain_transformers(pair: Pair, models, preset: str) -> None:
    asked = SamplingParams.preset(preset, temperature=0, max_tokens=30)
    for completion in pair.generate(QUESTIONS[:3], asked, chat=True):
        tokens, alphas = plain_greedy(models, pair, completion.prompt, asked)
        assert completion.token_ids == tokens
        assert completion.diagnostics.alpha == pytest.approx(alphas, abs=1e-4)


@torch.inference_mode()
def test_all_256_candidates_equal_plain_transformers(pair: Pair, models) -> None:
    asked = SamplingParams.preset("exploratory", seed=3, max_tokens=3, top_logprobs=256)
    mixing, prompt = pair.mixing, QUESTIONS[0]
    completion = pair.generate([prompt], asked)[0]
    assert completion.top is not None and len(completion.top) == 3

    ids = mixing.teacher.encode(prompt)
    for position, top in enumerate(completion.top):
        tokens = torch.tensor([ids + completion.token_ids[:position]])
        base, teacher = (model(tokens).logits[0, -1].double() for model in models)
        q = reference.mixture(
            base.tolist(),
            teacher.tolist(),
            masked_ids=mixing.special_ids,
            stop_ids=mixing.stop_ids,
            top_p=None,
            forced=False,
        ).q
        for candidates, expected in (
            (top.q, torch.tensor(q, dtype=torch.float64).log()),
            (top.base, base.log_softmax(-1)),
            (top.teacher, teacher.log_softmax(-1)),
        ):
            values = [value for _, value in candidates]
            assert len({i for i, _ in candidates}) == 256
            assert values == pytest.approx(expected.topk(256).values.tolist(), abs=1e-4)
            assert values == pytest.approx([expected[i].item() for i, _ in candidates], abs=1e-4)


def test_each_side_sees_its_own_prompt(pair: Pair, models) -> None:
    """The base's raw logprobs are those of its own prompt, the teacher's of its own."""
    (found,) = pair.generate(
        base_prompts=["Question: Why do birds sing?\nAnswer:"],
        teacher_prompts=[[{"role": "user", "content": "Tell me a short story about a bird."}]],
        params=params(max_tokens=8, ignore_eos=True),
    )
    prompts = (
        pair.mixing.base.encode(found.base_prompt),
        pair.mixing.teacher.encode_chat(found.prompt),
    )
    recorded = (found.diagnostics.base_logprobs, found.diagnostics.teacher_logprobs)
    for model, prompt, logprobs in zip(models, prompts, recorded, strict=True):
        with torch.inference_mode():
            rows = (
                model(torch.tensor([prompt + found.token_ids]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
            )
        expected = [rows[i, token].item() for i, token in enumerate(found.token_ids)]
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_both_kls_are_equal_at_every_unforced_token(pair: Pair) -> None:
    for preset in ("balanced", "exploratory"):
        for completion in pair.generate(
            QUESTIONS[:8], SamplingParams.preset(preset, seed=1, max_tokens=40), chat=True
        ):
            d = completion.diagnostics
            free = [i for i, forced in enumerate(d.forced) if not forced]
            assert max(abs(d.kl_base[i] - d.kl_teacher[i]) for i in free) <= 1e-5


def test_both_kls_are_equal_to_1e_6_in_float64() -> None:
    with Pair.local(dtype="float64", device="cpu") as pair:
        for completion in pair.generate(QUESTIONS[:4], params(), chat=True):
            d = completion.diagnostics
            assert d.forced == [True] + [False] * (len(d.forced) - 1)
            assert (
                max(abs(a - b) for a, b in zip(d.kl_base[1:], d.kl_teacher[1:], strict=True))
                <= 1e-6
            )


def test_same_seed_same_tokens_whatever_the_batch(pair: Pair) -> None:
    asked = params()
    alone = [pair.generate([q], asked, chat=True)[0].token_ids for q in QUESTIONS]
    assert [c.token_ids for c in pair.generate(QUESTIONS, asked, chat=True)] == alone
    assert [c.token_ids for c in pair.generate(QUESTIONS[::-1], asked, chat=True)] == alone[::-1]
    threes = [pair.generate(QUESTIONS[i : i + 3], asked, chat=True) for i in range(0, 16, 3)]
    assert [c.token_ids for batch in threes for c in batch] == alone
    other = [c.token_ids for c in pair.generate(QUESTIONS, params(seed=8), chat=True)]
    assert sum(a != b for a, b in zip(alone, other, strict=True)) >= 14


def test_more_sequences_than_slots_and_unequal_lengths() -> None:
    """Rows leave and join; each text is what it is alone."""
    with Pair.local(dtype="float32", device="cpu", max_num_seqs=3) as pair:
        prompts = [
            " ".join(["word"] * (1 + 37 * i % 90)) + " " + q for i, q in enumerate(QUESTIONS)
        ]
        batch = pair.generate(prompts, params(), chat=True)
        assert [c.token_ids for c in batch] == [
            pair.generate([p], params(), chat=True)[0].token_ids for p in prompts
        ]


def test_n_samples_differ_and_are_kept_together(pair: Pair) -> None:
    found = pair.generate(QUESTIONS[:2], params(n=4), chat=True)
    assert [(c.index, c.sample) for c in found] == [(i, s) for i in range(2) for s in range(4)]
    assert len({c.text for c in found[:4]}) > 1
    # Sample 0 of n is the completion that n = 1 gives.
    assert found[0].token_ids == pair.generate(QUESTIONS[:1], params(), chat=True)[0].token_ids


def test_stream_pieces_join_to_the_text(pair: Pair) -> None:
    for question in QUESTIONS[:4]:
        *tokens, completion = pair.stream(question, params(max_tokens=40), chat=True)
        assert isinstance(completion, Completion)
        assert all(isinstance(token, Token) for token in tokens)
        assert "".join(token.text for token in tokens) == completion.text
        assert [token.token_id for token in tokens] == completion.token_ids
        assert [token.position for token in tokens] == list(range(len(tokens)))
        assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
        assert tokens[-1].finish_reason == completion.finish_reason
        assert completion == pair.generate([question], params(max_tokens=40), chat=True)[0]


def test_stop_strings_end_the_text_and_never_leak(pair: Pair) -> None:
    plain = pair.generate(QUESTIONS[:1], params(), chat=True)[0]
    words = plain.text.split(" ")
    stop = " ".join(words[3:5])
    *tokens, completion = pair.stream(QUESTIONS[0], params(stop=(stop, "never said")), chat=True)
    assert completion.text == plain.text[: plain.text.index(stop)]
    assert "".join(token.text for token in tokens) == completion.text
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == plain.token_ids[: len(completion.token_ids)]


def test_stop_token_ids_end_the_sequence(pair: Pair) -> None:
    plain = pair.generate(QUESTIONS[:1], params(), chat=True)[0]
    stop = plain.token_ids[5]
    first = plain.token_ids.index(stop)
    completion = pair.generate(QUESTIONS[:1], params(stop_token_ids=(stop,)), chat=True)[0]
    assert completion.token_ids == plain.token_ids[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_min_tokens_and_ignore_eos_and_max_tokens(pair: Pair) -> None:
    question = ["Do lions live in caves?"]
    short = pair.generate(question, params(max_tokens=200), chat=True)[0]
    assert short.finish_reason == "stop" and short.stop_reason is None
    assert short.token_ids[-1] in pair.mixing.stop_ids
    length = len(short.token_ids)
    longer = pair.generate(question, params(max_tokens=200, min_tokens=length + 5), chat=True)[0]
    assert len(longer.token_ids) > length + 5
    endless = pair.generate(question, params(max_tokens=60, ignore_eos=True), chat=True)[0]
    assert (endless.finish_reason, len(endless.token_ids)) == ("length", 60)
    assert not set(endless.token_ids) & {*pair.mixing.stop_ids, *pair.mixing.special_ids}
    one = pair.generate(question, params(max_tokens=1), chat=True)[0]
    assert (one.finish_reason, len(one.token_ids), one.diagnostics.alpha) == ("length", 1, [1.0])


def test_generation_ends_at_the_smaller_context(pair: Pair) -> None:
    room = 5
    prompt = [1000] * (pair.mixing.teacher.max_context - room)
    found = pair.generate(
        base_prompts=[[1000]],
        teacher_prompts=[prompt],
        params=params(ignore_eos=True, max_tokens=50),
    )[0]
    assert (found.finish_reason, len(found.token_ids)) == ("length", room)


def test_special_token_ids_are_never_drawn(pair: Pair) -> None:
    plain = pair.generate(QUESTIONS[:1], params(), chat=True)[0]
    banned = plain.token_ids[2]
    found = pair.generate(QUESTIONS[:4], params(special_token_ids=(banned,)), chat=True)
    assert all(banned not in c.token_ids for c in found)


def test_rules_and_presets_change_what_is_drawn(pair: Pair) -> None:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    free = {
        "force_first_token": False,
        "constraint_to_target": False,
        "max_tokens": 30,
        "ignore_eos": True,
    }
    by_rule = {
        rule.spec: pair.generate(QUESTIONS[:4], params(alpha_rule=rule, **free), chat=True)
        for rule in (FixedAlpha(0), EqualKL(), FixedAlpha(1), KLBudget(0.01))
    }
    base, middle, teacher, budget = ([c.diagnostics for c in found] for found in by_rule.values())
    assert all(kl <= 1e-9 for d in base for kl in d.kl_base)
    assert all(kl <= 1e-9 for d in teacher for kl in d.kl_teacher)
    assert 0.3 < mean([a for d in middle for a in d.alpha]) < 0.7
    assert max(kl for d in budget for kl in d.kl_base) <= 0.01 + 1e-6
    # What an alone model draws is its own: log q is its raw log-probability but for the masked ids.
    for d in teacher:
        assert all(q >= raw - 1e-9 for q, raw in zip(d.logprobs, d.teacher_logprobs, strict=True))


def test_temperature_sharpens(pair: Pair) -> None:
    cool, hot = (
        pair.generate(
            QUESTIONS[:4],
            SamplingParams.preset("exploratory", temperature=t, seed=1, max_tokens=20),
            chat=True,
        )
        for t in (0.5, 1.5)
    )
    entropies = [[e for c in found for e in c.diagnostics.entropy] for found in (cool, hot)]
    assert sum(entropies[0]) / len(entropies[0]) < sum(entropies[1]) / len(entropies[1])


def test_one_model_as_base_and_teacher(pair: Pair) -> None:
    with Pair.local(TEACHER, TEACHER, dtype="float32", device="cpu", speculation="off") as same:
        found = same.generate(QUESTIONS[:2], params(), chat=True)
        assert all(
            a == 0.5
            for c in found
            for a, forced in zip(c.diagnostics.alpha, c.diagnostics.forced, strict=True)
            if not forced
        )
        assert all(abs(kl) < 1e-9 for c in found for kl in c.diagnostics.kl_base)
        # With prompts of its own for each side it is a mixture again.
        two = same.generate(
            base_prompts=[QUESTIONS[0]], teacher_prompts=[QUESTIONS[4]], params=params(), chat=True
        )[0]
        assert max(two.diagnostics.kl_base) > 0.01


def test_async_calls_share_the_batch(pair: Pair) -> None:
    async def run() -> list[list[int]]:
        calls = [pair.agenerate([q], params(), chat=True) for q in QUESTIONS[:6]]
        found = [c.token_ids for (c,) in await asyncio.gather(*calls)]
        pieces = [e async for e in pair.astream(QUESTIONS[0], params(), chat=True)]
        assert pieces[-1].token_ids == found[0]
        return found

    assert asyncio.run(run()) == [
        c.token_ids for c in pair.generate(QUESTIONS[:6], params(), chat=True)
    ]


def test_cancelling_and_leaving_a_stream_free_their_rows() -> None:
    with Pair.local(dtype="float32", device="cpu", max_num_seqs=1) as pair:
        endless = params(max_tokens=900, ignore_eos=True)
        for event in pair.stream(QUESTIONS[0], endless, chat=True):
            assert isinstance(event, Token)
            if event.position == 2:
                break

        async def cancel() -> None:
            task = asyncio.create_task(pair.agenerate([QUESTIONS[1]], endless, chat=True))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        # The only slot is free again: this would wait for 1800 tokens otherwise.
        assert (
            pair.generate([QUESTIONS[2]], params(max_tokens=3), chat=True)[0].finish_reason
            == "length"
        )
        assert pair.statistics()["total_requests"] == 1


def test_threads_share_the_engine(pair: Pair) -> None:
    expected = [c.token_ids for c in pair.generate(QUESTIONS[:4], params(), chat=True)]
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = pair.generate([QUESTIONS[number]], params(), chat=True)[0].token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == expected


def test_what_is_loaded_stays_out_of_garbage_collection() -> None:
    """Looking through it would hold up every sequence."""
    gc.unfreeze()
    with Pair.local(dtype="float32", device="cpu", speculation="off"):
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] > USUAL_THRESHOLDS[0]
    assert gc.get_threshold() == USUAL_THRESHOLDS


def test_a_closed_pair_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where it is in a cycle of references, which only garbage collection ends."""

    def start(engine: SteppingEngine, start=SteppingEngine.start) -> None:
        engine.itself = engine
        start(engine)

    monkeypatch.setattr(SteppingEngine, "start", start)
    with Pair.local(dtype="float32", device="cpu", speculation="off") as opened:
        engine = weakref.ref(opened.engine)
    del opened
    gc.collect()
    assert engine() is None


def test_statistics_count(pair: Pair) -> None:
    before = pair.statistics()
    found = pair.generate(QUESTIONS[:3], params(max_tokens=5, ignore_eos=True), chat=True)
    after = pair.statistics()
    grown = {key: after[key] - before[key] for key in before if key != "speculation"}
    assert grown["total_requests"] == 3 and grown["failed_requests"] == 0
    assert grown["total_tokens"] == sum(c.usage.completion_tokens for c in found) == 15
    assert grown["first_token_forced"] == 3 and grown["constraint_applied"] == 15
    assert after["success_rate"] == 1.0


def test_usage_counts_each_side(pair: Pair) -> None:
    found = pair.generate(["Why do birds sing?"], params(max_tokens=4, ignore_eos=True), chat=True)[
        0
    ]
    message = [{"role": "user", "content": "Why do birds sing?"}]
    assert found.usage.prompt_tokens == len(pair.mixing.teacher.encode_chat(message))
    assert found.usage.base_prompt_tokens == len(pair.mixing.base.encode_chat(message))
    assert found.usage.total_tokens == found.usage.prompt_tokens + 4


def test_text_prompts_without_chat_and_token_ids(pair: Pair) -> None:
    text = "Once upon a time, there was a little"
    as_text, as_ids = (
        pair.generate([prompt], params(), chat=False)[0]
        for prompt in (text, pair.mixing.teacher.encode(text))
    )
    assert as_text.token_ids == as_ids.token_ids
    assert as_text.usage.prompt_tokens == as_text.usage.base_prompt_tokens


def test_bundled_folders_are_what_pair_local_opens(pair: Pair) -> None:
    assert (pair.mixing.base.name, pair.mixing.teacher.name) == (str(BASE), str(TEACHER))


STUCK = """
import atexit
import threading

atexit.register(threading.Event().wait)  # as CUDA waits for kernels that never end

from midlogit import Pair
from midlogit.errors import EngineFailure

def step():
    begun.set()
    threading.Event().wait()

begun = threading.Event()
pair = Pair.local(dtype="float32", device="cpu")
pair.engine.step = step
running = pair.as_completed(["a"])
begun.wait()
pair.engine.end(EngineFailure("rank 1 has ended"), 0.5)
(completion,) = running
pair.close()
print(completion.error, end="")
"""


def test_a_process_whose_engine_is_stuck_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=120
    )
    assert "rank 1 has ended" in done.stdout
    assert done.returncode == 1
