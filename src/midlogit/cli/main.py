"""The `midlogit` command: its subcommands, options and exit codes; the modules beside it do the work.

Exit codes: 0 done, 1 failure, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from midlogit import __version__
from midlogit.cli.batch import batch
from midlogit.cli.command import PromptCommand
from midlogit.cli.console import complain, set_up_streams
from midlogit.cli.options import (
    AlphaRuleName,
    Base,
    BaseKey,
    BaseModel,
    BaseTemplate,
    BaseTemplateKwargs,
    BaseTokenizer,
    Device,
    Dtype,
    MaxTokens,
    PresetName,
    Seed,
    StopIdName,
    Teacher,
    TeacherKey,
    TeacherModel,
    TeacherTemplate,
    TeacherTokenizer,
    Temperature,
    TemplateKwargs,
    TopK,
    Trust,
)
from midlogit.cli.pair import pair_options, takes_pair
from midlogit.cli.report import report
from midlogit.cli.serve import serve
from midlogit.errors import InvalidRequest, MidlogitError

if TYPE_CHECKING:
    from midlogit.cli.loading import PairOptions

app = typer.Typer(
    help="Sample text from the exact middle of two language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.add_typer(batch, name="batch")
app.command()(report)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"midlogit {__version__}")
        raise typer.Exit


@app.command(cls=PromptCommand)
def demo(
    prompt: Annotated[
        str, typer.Argument(help="The message to both models, each in its own template.")
    ] = ("Tell me a short story about a fox."),
    base: Base = None,
    teacher: Teacher = None,
    preset: PresetName = "balanced",
    temperature: Temperature = 0.8,
    max_tokens: MaxTokens = 120,
    seed: Seed = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    base_chat_template: BaseTemplate = None,
    teacher_chat_template: TeacherTemplate = None,
    chat_template_kwargs: TemplateKwargs = None,
    base_chat_template_kwargs: BaseTemplateKwargs = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the coloured text as a page, with a hover."),
    ] = None,
) -> None:
    """Watch two models write one text: α, both KLs, and what each alone would have said."""
    from midlogit.cli.demo import run_demo
    from midlogit.cli.loading import (
        InProcess,
        PairOptions,
        are_urls,
        parse_template_kwargs,
        upstream,
    )
    from midlogit.params import SamplingParams

    params = SamplingParams.preset(
        preset, temperature=temperature, max_tokens=max_tokens, seed=seed, top_logprobs=3
    )
    upstreams = (
        upstream(base, chat_template=base_chat_template, trust_remote_code=trust_remote_code),
        upstream(teacher, chat_template=teacher_chat_template, trust_remote_code=trust_remote_code),
    )
    engine = "auto" if are_urls(base, teacher) else "local"  # vLLM takes longer to start
    options = PairOptions(base, teacher, upstreams, InProcess(engine, device, dtype))
    run_demo(
        prompt,
        params,
        options,
        parse_template_kwargs(chat_template_kwargs, base_chat_template_kwargs),
        html,
    )


@app.command(cls=PromptCommand)
@takes_pair
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Prompts; read from --input or standard input, one per line, when none is given."
        ),
    ] = None,
    *,
    input: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts, one per line; JSON lines if it ends in .jsonl or .ndjson."
        ),
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(
            help="JSON lines: the column of text, messages or token ids; by default prompt, else messages. If given, "
            "standard input and any file are read as JSON lines."
        ),
    ] = None,
    base_prompt_column: Annotated[
        str | None, typer.Option(help="JSON lines: the column of the base's own prompt.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the input.")] = "utf-8",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop before anything runs when one prompt cannot be honoured."
        ),
    ] = False,
    pair: PairOptions,
    base_prompt: Annotated[
        str | None, typer.Option(help="The base sees this text in place of the prompt.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are user messages, in each side's template.")
    ] = False,
    chat_template_kwargs: TemplateKwargs = None,
    base_chat_template_kwargs: BaseTemplateKwargs = None,
    max_tokens: MaxTokens = 256,
    min_tokens: Annotated[int, typer.Option(help="Fewest tokens of a completion.")] = 0,
    temperature: Temperature = 1.0,
    preset: PresetName = "balanced",
    target_top_p: Annotated[
        float | None, typer.Option(help="Hold the support to the teacher's top-p.")
    ] = None,
    alpha_rule: AlphaRuleName = None,
    stop_id: StopIdName = None,
    seed: Seed = None,
    n: Annotated[int, typer.Option(help="Completions for each prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print text as it is drawn, prompt by prompt.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print each completion as one line of JSON.")
    ] = False,
) -> None:
    """Sample completions from q*; without --base and --teacher from the bundled pair."""
    from midlogit.cli.generate import Job, run_generate
    from midlogit.cli.loading import mixture_changes, parse_template_kwargs
    from midlogit.jobs.inputs import Columns
    from midlogit.params import SamplingParams

    changes = mixture_changes(target_top_p, alpha_rule, stop_id)
    params = SamplingParams.preset(
        preset,
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        seed=seed,
        stop=tuple(stop or ()),
        **changes,
    )
    job = Job(
        prompts=prompts or [],
        file=input,
        encoding=encoding,
        columns=Columns(prompt_column, base_prompt_column),
        base_prompt=base_prompt,
        chat=chat,
        params=params,
        stream=stream,
        json=json,
        strict=strict,
        chat_template_kwargs=parse_template_kwargs(chat_template_kwargs, base_chat_template_kwargs),
    )
    raise typer.Exit(run_generate(job, pair))


@app.command()
def doctor(
    base: Base = None,
    teacher: Teacher = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    base_chat_template: BaseTemplate = None,
    teacher_chat_template: TeacherTemplate = None,
    top_k: TopK = "20",
    base_model: BaseModel = None,
    teacher_model: TeacherModel = None,
    base_tokenizer: BaseTokenizer = None,
    teacher_tokenizer: TeacherTokenizer = None,
    base_api_key: BaseKey = None,
    teacher_api_key: TeacherKey = None,
) -> None:
    """Say whether two models can be mixed: ids that differ, merged stop ids, context, memory; what servers offer."""
    from midlogit.cli.doctor import run_doctor

    pair = pair_options(
        base=base,
        teacher=teacher,
        base_chat_template=base_chat_template,
        teacher_chat_template=teacher_chat_template,
        trust_remote_code=trust_remote_code,
        top_k=top_k,
        base_model=base_model,
        teacher_model=teacher_model,
        base_tokenizer=base_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        base_api_key=base_api_key,
        teacher_api_key=teacher_api_key,
    )
    raise typer.Exit(run_doctor(pair, dtype))


app.command()(serve)


@app.command()
def presets() -> None:
    """List the presets."""
    from midlogit.params import PRESETS

    for preset in PRESETS.values():
        print(f"{preset.name:<14}{preset.description}")


def run() -> NoReturn:
    """Runs the command; every expected error is one line and an exit code."""
    code = _run()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the interpreter's own exit would answer it with a traceback
    sys.exit(code)


def _run() -> int:
    try:
        set_up_streams()
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except (MidlogitError, OSError) as error:
        complain(error)
        return 2 if isinstance(error, InvalidRequest) else 1
    except Exception as error:
        complain(
            f"{type(error).__name__} at {_place(error)}: {error}. This is a fault of midlogit: please report it."
        )
        return 1
    return 0


def _place(error: Exception) -> str:
    """The innermost file and line of midlogit in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next(
        (f for f in reversed(frames) if f"{os.sep}midlogit{os.sep}" in f.filename), frames[-1]
    )
    return f"{Path(frame.filename).name}:{frame.lineno}"
