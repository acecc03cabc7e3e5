"""Draws the completions that `benchmarks.same_tokens` compares; knows the public API of midlogit only.

    python -m benchmarks.draw_tokens ENGINE CASE COMPLETIONS SOURCE OUTPUT [BASE_URL TEACHER_URL]

Where a case runs four calls at once, a batch holds rows of different settings; which rows depends on timing. Logits of
the local engine depend on the batch by about 1e-5, so its drafting case runs one call at a time and repeats exactly.
HTTP runs one prompt at a time, between servers without a prefix cache.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ENGINES = ("local", "vllm", "http")
CASES: dict[str, str | int] = {"lock-step": "off", "drafting": 4}  # speculation of each
CALLS_AT_ONCE = {
    ("local", "lock-step"): 4,
    ("vllm", "lock-step"): 4,
    ("vllm", "drafting"): 4,
}  # 1 for the others
SERVER_FLAGS = (
    "--enforce-eager",
    "--max-model-len",
    "512",
    "--max-logprobs",
    "64",
    "--no-enable-prefix-caching",
)
VLLM_OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": (1 << 26, 1 << 26),
}

# Of the first setting; each has its own. No draw at this seed is so close that the batch decides it (at 2000 one is).
SEED = 3000
MAX_TOKENS = 24
EXACT = ("token_ids", "text", "finish_reason", "stop_reason")

BEGINNINGS = (
    "Once upon a time",
    "The little fox went into the old forest to",
    "Why do birds sing in the morning?",
    "Tom had a red ball. One day",
    "It was raining and the dog",
    "Do fish drink water?",
    "In the garden there was a",
    "Mia said: \u201cLook at the moon",
    "How do we make bread?",
    "The teacher asked the children",
    "Two frogs",
    "When the train came, the boy",
)
SUBJECTS = (
    "a cat",
    "the sea",
    "a kind king",
    "an old tree",
    "snow",
    "my friend Ben",
    "a lost shoe",
)


# Settings and prompts


@dataclass(frozen=True)
class Setting:
    """A preset with changes, and how prompts are given: plain, chat, messages, ids, apart (two texts), apart-chat."""

    preset: str
    form: str
    rule: str = "equal-kl"
    changes: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("balanced", "plain"),
    Setting("balanced", "chat"),
    Setting("exploratory", "plain"),
    Setting("exploratory", "chat", changes={"n": 2}),
    Setting("balanced", "apart", changes={"temperature": 0.7}),
    Setting("balanced", "plain", changes={"temperature": 0}),
    Setting("exploratory", "chat", changes={"temperature": 0}),
    Setting("exploratory", "apart", changes={"temperature": 1.3}),
    Setting("balanced", "chat", changes={"temperature": 1.3, "min_tokens": 12}),
    Setting("balanced", "plain", "kl-budget:0.1"),
    Setting("exploratory", "chat", "kl-budget:0.05", {"temperature": 0.7}),
    Setting("exploratory", "plain", "fixed:0.5"),
    Setting("balanced", "apart-chat", "fixed:0.3", {"temperature": 1.3}),
    Setting("balanced", "chat", changes={"n": 2, "stop": (".", " and")}),
    Setting("exploratory", "plain", changes={"stop": ("the", "e a"), "min_tokens": 8}),
    Setting("conservative", "chat", changes={"top_logprobs": 5}),
    Setting("balanced", "plain", changes={"target_top_p": 0.5, "ignore_eos": True}),
    Setting("exploratory", "messages", changes={"merge_stop_ids": False, "temperature": 0.7}),
    Setting(
        "balanced",
        "ids",
        changes={"stop_token_ids": (260, 261, 262), "exclude_special_tokens": False},
    ),
    Setting("balanced", "apart-chat", "kl-budget:0.02", {"n": 5, "special_token_ids": (300, 301)}),
)


@dataclass(frozen=True)
class Call:
    """The arguments of one `Pair.generate`."""

    number: int  # of its setting
    base_prompts: list[Any]
    teacher_prompts: list[Any]
    chat: bool
    params: Any


def prompts_of(form: str, number: int) -> tuple[Any, Any]:
    """Prompt `number` of a form: (base's, teacher's)."""
    beginning = BEGINNINGS[number % len(BEGINNINGS)]
    subject = SUBJECTS[number % len(SUBJECTS)]
    text = f"{beginning} {subject}" if number % 2 else beginning
    if form in ("apart", "apart-chat"):
        return f"Here is a short story about {subject}. {text}", text
    if form == "messages":
        messages = [
            {"role": "system", "content": "You tell stories."},
            {"role": "user", "content": text},
        ]
        return messages, messages[1:]
    if form == "ids":
        ids = [300 + (37 * number + 101 * place) % 3000 for place in range(3 + number % 5)]
        return ids, ids
    return text, text


def calls_of(completions: int, prompts_per_call: int | None) -> list[Call]:
    """The calls that draw so many completions, split evenly over the settings."""
    from midlogit import SamplingParams, parse_rule

    per_setting = math.ceil(completions / len(SETTINGS))
    calls = []
    for number, setting in enumerate(SETTINGS):
        params = SamplingParams.preset(
            setting.preset,
            seed=SEED + number,
            max_tokens=MAX_TOKENS,
            alpha_rule=parse_rule(setting.rule),
            **setting.changes,
        )
        prompts = [
            prompts_of(setting.form, 5 * number + i)
            for i in range(math.ceil(per_setting / params.n))
        ]
        step = prompts_per_call or len(prompts)
        for start in range(0, len(prompts), step):
            base, teacher = zip(*prompts[start : start + step], strict=True)
            chat = setting.form in ("chat", "apart-chat")
            calls.append(Call(number, list(base), list(teacher), chat, params))
    return calls


# One engine and case


def open_pair(engine: str, speculation: str | int, urls: Sequence[str]) -> Any:
    from midlogit import Pair

    if engine == "local":
        return Pair.local(dtype="float32", device="cpu", speculation=speculation)
    if engine == "vllm":
        return Pair.vllm(speculation=speculation, **VLLM_OPTIONS)
    return Pair.http(*urls, speculation=speculation)


def draw(options: argparse.Namespace) -> dict[str, Any]:
    """The completions of a case as plain data, and scores of given texts for the local engine."""
    import midlogit

    imported = Path(midlogit.__file__)
    assert imported.is_relative_to(options.source), f"{imported} was imported, not {options.source}"

    calls = calls_of(options.completions, 1 if options.engine == "http" else None)
    with open_pair(options.engine, CASES[options.case], options.urls) as pair:

        def run(call: Call) -> list[dict[str, Any]]:
            found = pair.generate(
                base_prompts=call.base_prompts,
                teacher_prompts=call.teacher_prompts,
                params=call.params,
                chat=call.chat,
                progress=False,
            )
            return [completion_as_data(call, completion) for completion in found]

        with ThreadPoolExecutor(CALLS_AT_ONCE.get((options.engine, options.case), 1)) as threads:
            completions = [data for found in threads.map(run, calls) for data in found]

        scores = score(pair) if (options.engine, options.case) == ("local", "lock-step") else []
        accepted = pair.statistics()["speculation"]["accepted"]
        return {"completions": completions, "scores": scores, "accepted": accepted}


def completion_as_data(call: Call, completion: Any) -> dict[str, Any]:
    if completion.error:
        raise RuntimeError(f"setting {call.number}, {completion.prompt!r}: {completion.error}")
    return {
        "where": f"setting {call.number}, {completion.prompt!r}, sample {completion.sample}",
        **{name: getattr(completion, name) for name in EXACT},
        "diagnostics": asdict(completion.diagnostics),
    }


def score(pair: Any) -> list[dict[str, Any]]:
    """Scores of a few texts, each side with its own prompt."""
    from midlogit import SamplingParams

    teacher = [f"{beginning} {subject}." for beginning in BEGINNINGS[:4] for subject in SUBJECTS]
    base = [f"Here is a short story. {text}" for text in teacher]
    found = pair.score(
        base_prompts=base, teacher_prompts=teacher, params=SamplingParams.preset("exploratory")
    )
    return [
        {
            "where": repr(text),
            "token_ids": list(scores.token_ids[scores.first :]),
            "text": text,
            "finish_reason": scores.error,
            "stop_reason": None,
            "diagnostics": asdict(scores.diagnostics),
        }
        for text, scores in zip(teacher, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("completions", type=int)
    parser.add_argument("source", type=Path, help="the folder that midlogit must be imported from")
    parser.add_argument("output", type=Path)
    parser.add_argument("urls", nargs="*")
    options = parser.parse_args()
    options.output.write_text(json.dumps(draw(options)))


if __name__ == "__main__":
    main()
