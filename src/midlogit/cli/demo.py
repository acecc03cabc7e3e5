"""`midlogit demo`: one text written by two models, then its figures.

Knows what to show and how to colour it; every number comes from the tokens' own diagnostics.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import fmean

from midlogit.cli.loading import PairOptions, open_pair
from midlogit.core.rules import FixedAlpha
from midlogit.look import rgb
from midlogit.messages import TemplateOptions
from midlogit.outputs import Candidates, Completion, Token
from midlogit.pair import Pair
from midlogit.params import SamplingParams

TRACED = 12
CONTEXT_CHARACTERS = 44


def run_demo(
    prompt: str,
    params: SamplingParams,
    options: PairOptions,
    chat_template_kwargs: TemplateOptions,
    page: Path | None,
) -> None:
    """Runs and prints the demo.

    Args:
        page: file of the text as a page.

    Raises:
        MidlogitError: as `Pair.local` and `Pair.stream`. OSError: the page cannot be written.
    """
    with open_pair(options) as pair:
        print(f"base     {options.base or 'the bundled base'}")
        print(f"teacher  {options.teacher or 'the bundled teacher'}")
        print(f"prompt   {prompt}")
        print(f"\nq*, coloured by α from {_paint('base', 0)} to {_paint('teacher', 1)}:\n")

        start = time.perf_counter()
        tokens, completion = _write(pair, prompt, params, chat_template_kwargs)
        seconds = time.perf_counter() - start
        if completion.error is not None:
            print(f"midlogit: {completion.error}", file=sys.stderr)
            raise SystemExit(1)

        print("\n\nEach model alone, same prompt and seed:")
        written = {}
        for name, alpha in (("base", 0.0), ("teacher", 1.0)):
            alone = replace(
                params,
                alpha_rule=FixedAlpha(alpha),
                force_first_token=False,
                constraint_to_target=False,
                top_logprobs=0,
            )
            text = pair.generate(
                [prompt], alone, chat=True, chat_template_kwargs=chat_template_kwargs
            )[0].text
            written[name] = text
            print(f"  {_paint(f'{name:<8}', alpha)} {' '.join(text.split())}")

        _print_trace(pair, tokens)
        _print_figures(completion, seconds)
        _print_disagreements(pair, tokens)
        if page is not None:
            from midlogit.jobs.files import write_whole
            from midlogit.report.text_page import text_page
            from midlogit.report.tokens import TokenTexts

            names = TokenTexts(pair.mixing.teacher.detokenizer)
            text = text_page(prompt, tokens, completion, names, written)
            write_whole(page, text.encode())
            print(f"\n{page}")


def _write(
    pair: Pair, prompt: str, params: SamplingParams, chat_template_kwargs: TemplateOptions
) -> tuple[list[Token], Completion]:
    tokens: list[Token] = []
    for event in pair.stream(prompt, params, chat=True, chat_template_kwargs=chat_template_kwargs):
        if isinstance(event, Completion):
            return tokens, event
        text = event.text.lstrip() if event.position == 0 else event.text
        print(_paint(text, event.decision.alpha), end="", flush=True)
        tokens.append(event)
    raise AssertionError("a stream ends with its completion")


def _print_trace(pair: Pair, tokens: list[Token]) -> None:
    """Prints the first sampled tokens, each with the most likely token of each model alone."""
    print(f"\nThe first {min(TRACED, len(tokens))} tokens:")
    print(
        f"  {'drawn':<14}{'α':>6}{'KL base':>9}{'KL teacher':>12}   {'base would say':<20}teacher would say"
    )
    for token in tokens[:TRACED]:
        d = token.decision
        assert d.top is not None
        said = [_choices(pair, candidates, 1) for candidates in (d.top.base, d.top.teacher)]
        name = _paint(f"{token.token!r:<14}", d.alpha)
        note = "  (forced)" if d.forced else ""
        print(
            f"  {name}{d.alpha:>6.3f}{d.kl_base:>z9.4f}{d.kl_teacher:>z12.4f}   {said[0]:<20}{said[1]}{note}"
        )


def _print_figures(completion: Completion, seconds: float) -> None:
    d = completion.diagnostics
    free = [i for i, forced in enumerate(d.forced) if not forced]

    print("\nOver all tokens (α and KL without the forced one):")
    rows = [("tokens", f"{len(d.alpha)} ({completion.finish_reason})")]
    if free:
        rows += [
            ("mean α", f"{fmean(d.alpha[i] for i in free):.3f}"),
            ("mean KL to each", f"{fmean(d.kl_base[i] for i in free):.4f} nats"),
            (
                "largest |KL base − KL teacher|",
                f"{max(abs(d.kl_base[i] - d.kl_teacher[i]) for i in free):.1e} nats",
            ),
            ("ESS ratio base/teacher", f"{fmean(d.ess_ratio[i] for i in free):.3f}"),
        ]
    rows.append(("tokens/s", f"{len(d.alpha) / seconds:.1f}"))

    for name, value in rows:
        print(f"  {name:<32}{value}")


def _print_disagreements(pair: Pair, tokens: list[Token]) -> None:
    """Prints the three positions where q* is farthest from both models."""
    free = [token for token in tokens if not token.decision.forced]
    most = sorted(free, key=lambda token: -(token.decision.kl_base + token.decision.kl_teacher))[:3]
    if not most:
        return

    print("\nWhere the two models disagree most:")
    for token in sorted(most, key=lambda token: token.position):
        d = token.decision
        assert d.top is not None
        before = "".join(t.text for t in tokens[: token.position])[-CONTEXT_CHARACTERS:].replace(
            "\n", " "
        )
        print(f"  …{before}[{token.token}]   α {d.alpha:.3f}, KL {d.kl_base:.3f} to each")
        for name, candidates, alpha in (
            ("base", d.top.base, 0.0),
            ("q*", d.top.q, d.alpha),
            ("teacher", d.top.teacher, 1.0),
        ):
            print(f"      {_paint(f'{name:<8}', alpha)} {_choices(pair, candidates, 3)}")


def _choices(pair: Pair, candidates: Candidates, most: int) -> str:
    text = pair.mixing.teacher.detokenizer.token
    return "  ".join(f"{text(i)!r} {exp(lp):.2f}" for i, lp in candidates[:most])


def _paint(text: str, alpha: float) -> str:
    """Colours text between base and teacher; plain text when stdout is not a terminal or NO_COLOR is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text

    return f"\x1b[38;2;{';'.join(map(str, rgb(alpha)))}m{text}\x1b[0m"
