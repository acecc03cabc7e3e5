"""`midlogit batch`: its sub-commands and their options; the modules beside it do the work.

Exit codes: 0 done, 1 failure, 2 usage, 4 done with error rows, 75 stopped with work left.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from midlogit.cli.options import (
    AlphaRuleName,
    BaseTemplateKwargs,
    MaxTokens,
    PresetName,
    StopIdName,
    Temperature,
    TemplateKwargs,
)
from midlogit.cli.pair import takes_pair

if TYPE_CHECKING:
    from midlogit.cli.loading import PairOptions

batch = typer.Typer(
    help="Batch jobs: prompts of any number, results that survive crashes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Run = Annotated[Path, typer.Argument(help="The folder of the job.")]
MaxErrors = Annotated[
    str, typer.Option(help="Most completions that may end as errors: a number, or a share.")
]
Worker = Annotated[
    str | None,
    typer.Option(
        help="Which of several workers this is, such as 0/8; by default as Slurm arrays, Kubernetes indexed jobs or "
        "SkyPilot say, else the only one."
    ),
]


@batch.command("plan", help="Read and check the input into RUN; run then goes on from there.")
@batch.command(
    "run",
    help="Work on a job until it is complete; the same line begins it and goes on after a crash.",
)
@takes_pair
def run(
    context: typer.Context,
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="INPUT",
            help="Text, JSON lines (.gz, .zst), Parquet, a datasets folder, OpenAI batch lines.",
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The folder of the job.")],
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids; by default id, else custom_id, else none.")
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(
            help="Column of text, messages or token ids; by default prompt, else messages."
        ),
    ] = None,
    base_prompt_column: Annotated[
        str | None, typer.Option(help="Column of the base's own prompt.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text and JSON lines.")] = "utf-8",
    pair: PairOptions,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Text prompts are user messages, in each side's template."),
    ] = False,
    chat_template_kwargs: TemplateKwargs = None,
    base_chat_template_kwargs: BaseTemplateKwargs = None,
    n: Annotated[int, typer.Option(help="Completions for each row.")] = 1,
    seed: Annotated[
        int, typer.Option(help="Of the job: a row with its id draws the same tokens again.")
    ] = 0,
    max_tokens: MaxTokens = 256,
    min_tokens: Annotated[int, typer.Option(help="Fewest tokens of a completion.")] = 0,
    temperature: Temperature = 1.0,
    preset: PresetName = "balanced",
    target_top_p: Annotated[
        float | None, typer.Option(help="Hold the support to the teacher's top-p.")
    ] = None,
    alpha_rule: AlphaRuleName = None,
    stop_id: StopIdName = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")
    ] = None,
    top_logprobs: Annotated[
        int, typer.Option(help="Store this many candidates per token of q*, base and teacher.")
    ] = 0,
    diagnostics: Annotated[
        str,
        typer.Option(
            help="Per token: full, compact (rounded to 16 bits but for log-probabilities) or none."
        ),
    ] = "full",
    rows_per_part: Annotated[
        int | None, typer.Option(help="Rows of each part; by default about 1,024 completions.")
    ] = None,
    max_errors: MaxErrors = "1%",
    worker: Worker = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Work on Ray: local starts one here, auto takes the cluster of this machine; or an address.",
        ),
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="On Ray: actors with a pair each, LO:HI; by default 1.")
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(help="On Ray: by default as many as the models need.")
    ] = None,
) -> None:
    from midlogit.cli.jobs import OnRay, plan_job, run_job
    from midlogit.cli.loading import mixture_changes, parse_template_kwargs
    from midlogit.jobs import Columns, JobOptions
    from midlogit.params import SamplingParams
    from midlogit.requests.prompts import Reading

    changes = mixture_changes(target_top_p, alpha_rule, stop_id)
    params = SamplingParams.preset(
        preset,
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        seed=seed,
        stop=tuple(stop or ()),
        top_logprobs=top_logprobs,
        **changes,
    )
    variables = None
    if chat_template_kwargs is not None or base_chat_template_kwargs is not None:
        variables = parse_template_kwargs(chat_template_kwargs, base_chat_template_kwargs)
    options = JobOptions(
        params=params,
        reading=Reading(chat, variables),
        columns=Columns(prompt=prompt_column, base_prompt=base_prompt_column, id=id_column),
        encoding=encoding,
        diagnostics=diagnostics,  # type: ignore[arg-type]
        rows_per_part=rows_per_part,
        max_errors=max_errors,
    )
    if context.info_name == "plan":
        raise typer.Exit(plan_job(inputs or [], out, options, pair))
    on_ray = OnRay(ray, replicas, gpus_per_replica)
    raise typer.Exit(run_job(inputs or [], out, options, pair, worker, on_ray))


@batch.command()
def status(
    run: Run,
    watch: Annotated[
        bool, typer.Option("--watch", help="Say it again every two seconds until it is complete.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what is done of a job, from its files alone."""
    from midlogit.cli.jobs import show_status

    raise typer.Exit(show_status(run, watch=watch, json=json))


@batch.command()
@takes_pair
def retry(
    run: Run,
    *,
    errors: Annotated[
        bool, typer.Option("--errors", help="Completions that ended as errors; the default.")
    ] = True,
    pair: PairOptions,
    max_errors: MaxErrors = "100%",
    worker: Worker = None,
) -> None:
    """Make completions again that ended as errors; the parts that hold them are replaced."""
    from midlogit.cli.jobs import retry_job

    raise typer.Exit(retry_job(run, pair, worker, max_errors))


@batch.command()
def verify(run: Run) -> None:
    """Check that every completion is there exactly once and every file is sound; exit code 1 otherwise."""
    from midlogit.cli.jobs import verify_job

    raise typer.Exit(verify_job(run))


@batch.command()
def export(
    run: Run,
    to: Annotated[
        str,
        typer.Option(
            help="trl-sft, trl-prompt, verl-rl, verl-sft, slime-rl, axolotl-kd, openai, jsonl or datasets."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The new file, or folder of datasets; by default in RUN/exports."),
    ] = None,
    top_of: Annotated[
        str | None,
        typer.Option(help="Whose candidates axolotl-kd takes: q or teacher.  [default: q]"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the teacher's tokenizer, for axolotl-kd."),
    ] = None,
) -> None:
    """Write the results of a complete job in the format of a trainer or client."""
    from midlogit.cli.jobs import export_job

    raise typer.Exit(export_job(run, to, out, top_of, tokenizer))
