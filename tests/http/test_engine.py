"""Two real servers against the local engine, and everything that a request may ask for."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from midlogit import (
    Completion,
    EngineFailure,
    InvalidRequest,
    KLBudget,
    Pair,
    SamplingParams,
    Token,
)
from midlogit.requests.prompts import Reading
from midlogit.requests.sequence import Sequence
from tests.http.conftest import FLAGS, WHOLE, Urls
from tests.http.proxy import Proxy, from_elsewhere
from tests.http.servers import VERSION, serving
from tests.records import PRECISION, assert_recomputed, tempered
from tests.wider import with_own_stop

WORDS = [
    "the",
    "little",
    "fox",
    "went",
    "into",
    "the",
    "old",
    "forest",
    "to",
    "look",
    "for",
    "a",
    "friend",
    "and",
    "found",
    "a",
    "warm",
    "house",
    "by",
    "the",
    "river",
]
PROMPTS = [" ".join(WORDS[: 1 + n]) + (" ?" if n % 3 == 0 else "") for n in range(16)]
BASE_PROMPTS = [f"Here is a story. {prompt}" for prompt in reversed(PROMPTS)]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def whole(urls: Urls) -> Pair:
    with Pair.http(urls.base, urls.teacher, top_k=WHOLE) as opened:
        yield opened


@pytest.fixture(scope="module")
def http(urls: Urls) -> Pair:
    with Pair.http(urls.base, urls.teacher) as opened:
        yield opened


def both(pair: Pair, params: SamplingParams, prompts: int = 16) -> list[Completion]:
    return pair.generate(
        base_prompts=BASE_PROMPTS[:prompts],
        teacher_prompts=PROMPTS[:prompts],
        params=params,
        progress=False,
    )


def test_whole_vocabulary_equals_the_local_engine(pair: Pair, whole: Pair) -> None:
    for local, served in zip(both(pair, GREEDY, 8), both(whole, GREEDY, 8), strict=True):
        assert served.token_ids == local.token_ids
        assert (served.text, served.finish_reason) == (local.text, local.finish_reason)
        assert served.diagnostics.alpha == pytest.approx(local.diagnostics.alpha, abs=1e-4)
        assert served.diagnostics.kl_base == pytest.approx(local.diagnostics.kl_base, abs=1e-4)
        assert served.diagnostics.base_logprobs == pytest.approx(
            local.diagnostics.base_logprobs, abs=1e-4
        )
        assert set(served.diagnostics.tv_bound) == {0.0} == set(served.diagnostics.alpha_bound)
        assert set(served.diagnostics.coverage) == {1.0}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_against_the_models(whole: Pair, http: Pair, models, temperature: float) -> None:
    """Whole lists give what a trainer recomputes; short ones are off by no more than their bounds."""
    params = SamplingParams.preset("rollout", temperature=temperature, max_tokens=10, seed=3)
    for completion in both(whole, params, 4):
        assert_recomputed(completion.rollout(), models, temperature)
    for completion in both(http, params, 6):
        rollout, bounds = completion.rollout(), completion.diagnostics.base_tempered_bound
        truth = tempered(models[0], rollout.prompt_token_ids, rollout.token_ids, temperature)
        for found, true, bound in zip(rollout.base_logprobs, truth, bounds, strict=True):
            assert abs(found - true) <= bound + PRECISION
        if rollout.finish_reason == "stop":
            assert rollout.token_ids[-1] in http.mixing.base.stop_ids


def test_top_20_keeps_its_word_against_the_local_engine(pair: Pair, http: Pair) -> None:
    # The base drafts from its list here and from its whole row there: an exact row has the same law, and at this seed
    # the same tokens.
    params = SamplingParams(max_tokens=24, seed=2)
    compared = exact = 0
    for local, served in zip(both(pair, params), both(http, params), strict=True):
        for position, (a, b) in enumerate(zip(local.token_ids, served.token_ids, strict=False)):
            ours, theirs = local.diagnostics, served.diagnostics
            assert (
                abs(ours.alpha[position] - theirs.alpha[position])
                <= theirs.alpha_bound[position] + 1e-4
            )
            compared += 1
            exact += theirs.tv_bound[position] == 0
            if theirs.tv_bound[position] == 0:
                assert a == b
                assert theirs.base_logprobs[position] == pytest.approx(
                    ours.base_logprobs[position], abs=1e-4
                )
            if a != b:
                break
    assert compared > 30
    if http.engine.sides.scores:  # vLLM 0.24 does not
        assert exact > 3


def test_reported_logprobs_are_the_models_own(pair: Pair, urls: Urls) -> None:
    """Lists that end before the nucleus does: what the teacher did not list is asked for."""
    params = SamplingParams(max_tokens=16, seed=4, target_top_p=0.99)
    with Pair.http(urls.base, urls.teacher, top_k=4) as narrow:
        scored = narrow.engine.sides.scores
        found = narrow.generate(PROMPTS, params, progress=False)
    texts = [
        pair.mixing.teacher.encode(c.prompt) + c.token_ids
        for c in found
        if c.finish_reason == "length"
    ]
    scores = pair.score(texts, SamplingParams.preset("exploratory"))
    outside = 0
    for completion, own in zip(
        (c for c in found if c.finish_reason == "length"), scores, strict=True
    ):
        for side in ("base", "teacher"):
            reported = getattr(completion.diagnostics, f"{side}_logprobs")
            bounded = getattr(completion.diagnostics, f"{side}_bounded")
            true = getattr(own.diagnostics, f"{side}_logprobs")[-len(reported) :]
            for ours, exact, only_bound in zip(reported, true, bounded, strict=True):
                assert ours > exact - 1e-3 if only_bound else ours == pytest.approx(exact, abs=1e-3)
                assert not (only_bound and scored)
        outside += sum(logprob < -4 for logprob in completion.diagnostics.teacher_logprobs)
    assert len(texts) > 4 and outside > 3


def test_a_stop_id_of_the_teacher_alone_ends_texts(urls: Urls, tmp_path: Path) -> None:
    _, teacher = with_own_stop(tmp_path)
    params = SamplingParams(max_tokens=150, n=4)
    with serving(teacher, flags=FLAGS, version=os.environ.get("MIDLOGIT_TEST_VLLM", VERSION)) as (
        url,
    ):
        for speculation in ("off", 3):
            with Pair.http(urls.base, url, speculation=speculation) as own:
                found = own.generate(
                    ["Tell me a story.", "Who is there?"], params, chat=True, progress=False
                )
                assert own.mixing.stop_ids == (0, WHOLE)
            stops = [completion for completion in found if completion.finish_reason == "stop"]
            assert len(stops) >= 6 and {completion.token_ids[-1] for completion in stops} == {WHOLE}


def test_same_seed_same_tokens_alone_and_in_a_batch(http: Pair) -> None:
    params = SamplingParams(max_tokens=12, seed=7)
    together = both(http, params)
    for n in (0, 9):
        alone = http.generate(
            base_prompts=[BASE_PROMPTS[n]], teacher_prompts=[PROMPTS[n]], params=params
        )[0]
        assert alone.token_ids == together[n].token_ids


def test_chat_stream_and_stop_string(http: Pair) -> None:
    params = SamplingParams(max_tokens=40, seed=2)
    tokens = list(http.stream("Tell me a story.", params, chat=True))
    completion = tokens.pop()
    assert isinstance(completion, Completion)
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == completion.text
    assert completion.diagnostics.forced[0] and completion.diagnostics.alpha[0] == 1
    stop = completion.text[8:11]
    cut = http.generate(["Tell me a story."], replace(params, stop=(stop,)), chat=True)[0]
    assert cut.text == completion.text[: completion.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_every_parameter_of_the_local_engine(pair: Pair, whole: Pair) -> None:
    for params in (
        SamplingParams.preset("exploratory", max_tokens=4, seed=1, temperature=0.7),
        SamplingParams.preset(
            "conservative", max_tokens=4, seed=1, min_tokens=4, alpha_rule=KLBudget(0.1)
        ),
        SamplingParams(
            max_tokens=4, seed=1, n=2, ignore_eos=True, special_token_ids=(40, 41), top_logprobs=3
        ),
    ):
        prompts = PROMPTS[:2]
        local = pair.generate(prompts, params, progress=False)
        served = whole.generate(prompts, params, progress=False)
        assert [c.token_ids for c in served] == [c.token_ids for c in local]
        if params.top_logprobs:
            for a, b in zip(local, served, strict=True):
                assert [i for i, _ in a.top[0].base] == [i for i, _ in b.top[0].base]


def test_adaptive_width_meets_its_tolerance(urls: Urls, proxies: tuple[Proxy, Proxy]) -> None:
    base, teacher = proxies
    asked = set()

    def note(path: str, body: dict[str, object]) -> dict[str, object]:
        asked.add(body.get("logprobs"))
        return body

    base.rewrite_request = note
    params = SamplingParams.preset("exploratory", max_tokens=8, seed=1)
    with Pair.http(base.url, teacher.url, top_k="auto", tolerance=0.02) as pair:
        completions = pair.generate(PROMPTS[:4], params, progress=False)
    assert max(bound for c in completions for bound in c.diagnostics.tv_bound) <= 0.02
    assert {20, 80} <= asked


def test_adaptive_width_says_when_it_cannot(
    proxies: tuple[Proxy, Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    base, teacher = proxies
    base.max_logprobs = 40
    with (
        caplog.at_level("WARNING", logger="midlogit"),
        Pair.http(base.url, teacher.url, top_k="auto", tolerance=1e-5) as pair,
    ):
        pair.generate(
            PROMPTS[:2], SamplingParams.preset("exploratory", max_tokens=4, seed=1), progress=False
        )
    assert caplog.text.count("--max-logprobs") == 1
    assert " 40 " in caplog.text


def test_256_in_flight_keep_their_order(http: Pair) -> None:
    prompts = [f"{PROMPTS[n % 16]} {n}" for n in range(256)]
    params = SamplingParams(max_tokens=3, seed=1)
    found = http.generate(prompts, params, progress=False)
    assert [c.prompt for c in found] == prompts
    assert all(len(c.token_ids) == 3 or c.finish_reason == "stop" for c in found)
    assert http.statistics()["failed_requests"] == 0
    alone = http.generate([prompts[200]], params)[0]
    assert alone.token_ids == found[200].token_ids


def test_rows_of_a_step_share_a_call_and_a_lone_one_does_not_wait(
    proxies: tuple[Proxy, Proxy],
) -> None:
    base, teacher = proxies
    with Pair.http(base.url, teacher.url) as pair:
        before = teacher.calls, teacher.rows
        pair.generate(PROMPTS, replace(GREEDY, ignore_eos=True), progress=False)
        calls, rows = teacher.calls - before[0], teacher.rows - before[1]
    assert rows >= 16 * 8
    assert calls < rows / 3


def test_asyncio_cancelling_ends_the_requests(http: Pair) -> None:
    async def run() -> None:
        task = asyncio.create_task(
            http.agenerate(PROMPTS, SamplingParams(max_tokens=400, ignore_eos=True))
        )
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len((await http.agenerate(["a fox"], GREEDY))[0].token_ids) > 0

    asyncio.run(run())


def test_stopping_at_once_ends_every_request(http: Pair) -> None:
    for _ in range(5):
        completions = http.as_completed(
            PROMPTS, SamplingParams(max_tokens=400, ignore_eos=True)
        ).stop()
        assert [c.finish_reason for c in completions] == ["abort"] * len(PROMPTS)


def test_closing_aborts_and_keeps_what_was_drawn(urls: Urls) -> None:
    pair = Pair.http(urls.base, urls.teacher)
    batch = pair.as_completed(PROMPTS[:4], SamplingParams(max_tokens=450, ignore_eos=True))
    stream = pair.stream(PROMPTS[0], SamplingParams(max_tokens=450, ignore_eos=True))
    for _ in range(5):
        next(stream)
    pair.close()
    completions = list(batch)
    assert {c.finish_reason for c in completions} == {"abort"}
    assert all(c.token_ids for c in completions)
    with pytest.raises(EngineFailure, match="closed"):
        pair.generate(["a fox"])


def test_tokenizers_of_the_servers_alone(proxies: tuple[Proxy, Proxy], http: Pair) -> None:
    """The servers are elsewhere, so ids, chat templates, stop ids and text all come from them."""
    base, teacher = proxies
    base.rewrite_answer = teacher.rewrite_answer = from_elsewhere
    params = SamplingParams(max_tokens=60, seed=3)
    with Pair.http(base.url, teacher.url) as remote:
        assert remote.mixing.stop_ids == http.mixing.stop_ids
        assert remote.mixing.base.vocabulary is None
        ours = http.generate(
            ["Tell me a story.", "Who are you? ☃"], params, chat=True, progress=False
        )
        theirs = remote.generate(
            ["Tell me a story.", "Who are you? ☃"], params, chat=True, progress=False
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (b.token_ids, b.text, b.finish_reason) == (a.token_ids, a.text, a.finish_reason)
        *tokens, completion = remote.stream("Tell me a story.", params, chat=True)
        assert completion.text == ours[0].text == "".join(token.text for token in tokens)
        stop = ours[0].text[6:10]
        cut = remote.generate(["Tell me a story."], replace(params, stop=(stop,)), chat=True)[0]
        assert cut.text == ours[0].text[: ours[0].text.index(stop)]
        inside = [http.mixing.teacher.encode("I like 🦊")[:-1]]
        expected = http.generate(inside, GREEDY, progress=False)[0].text
        assert len(expected) > 1 and "\ufffd" not in expected
        *tokens, completion = remote.stream(inside[0], GREEDY)
        assert "".join(token.text for token in tokens) == completion.text == expected
        assert remote.generate(inside, GREEDY, progress=False)[0].text == expected


def test_at_most_max_num_seqs_run_and_the_others_wait_in_order(urls: Urls) -> None:
    params = [SamplingParams(max_tokens=1 + n % 3, ignore_eos=True, seed=1) for n in range(6)]
    for most in (1, 2):
        ended: list[Sequence] = []
        with Pair.http(urls.base, urls.teacher, max_num_seqs=most) as pair:
            assert pair.engine.max_num_seqs == most
            pair.observer = ended.append
            batch = pair.start([])
            for n, prompt in enumerate(PROMPTS[:6]):
                batch.submit(pair.prepare([prompt], params[n], Reading()))
            assert len(list(batch)) == 6

        spans = [(s.token_times[0], s.token_times[-1]) for s in ended]
        for begin, _ in spans:
            assert sum(start <= begin <= end for start, end in spans) <= most
        if most == 1:
            assert [s.request.prompt for s in ended] == PROMPTS[:6]


def test_sequences_that_wait_can_be_aborted(urls: Urls) -> None:
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    with Pair.http(urls.base, urls.teacher, max_num_seqs=1) as pair:
        batch = pair.start(pair.prepare(PROMPTS[:4], long, Reading()))
        others = pair.as_completed(PROMPTS[4:5], SamplingParams(max_tokens=2, ignore_eos=True))
        assert [c.finish_reason for c in batch.stop()] == ["abort"] * 4
        assert [c.finish_reason for c in others] == ["length"]
        unfinished = pair.start(pair.prepare(PROMPTS[:4], long, Reading()))
    assert [c.finish_reason for c in unfinished] == ["abort"] * 4  # the pair was closed


@pytest.mark.parametrize("speculation", ["off", 2])
def test_more_candidates_than_top_k(urls: Urls, pair: Pair, speculation: str | int) -> None:
    """The lists are as wide as the report, and no wider than the servers allow."""
    params = SamplingParams(max_tokens=5, ignore_eos=True, seed=2, top_logprobs=50)
    with (
        Proxy(urls.base) as base,
        Proxy(urls.teacher) as teacher,
    ):
        base.max_logprobs = 60
        with Pair.http(base.url, teacher.url, speculation=speculation) as http:  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match=r"the servers list 60 .*--max-logprobs 61"):
                http.generate(PROMPTS[:1], replace(params, top_logprobs=61))
            found = http.generate(PROMPTS[:1], params)[0]
    assert found.error is None and found.top is not None and len(found.top) == 5

    ids = pair.mixing.teacher.encode(PROMPTS[0])
    one = replace(params, max_tokens=1, ignore_eos=False)
    for position, top in enumerate(found.top):
        whole = pair.generate([ids + found.token_ids[:position]], one)[0].top
        assert whole is not None
        for ours, theirs in ((top.base, whole[0].base), (top.teacher, whole[0].teacher)):
            assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], abs=1e-4)
            common = dict(ours).keys() & dict(theirs).keys()  # the order of near ties may differ
            assert len(common) >= 48
            assert all(abs(dict(ours)[i] - dict(theirs)[i]) < 1e-4 for i in common)
