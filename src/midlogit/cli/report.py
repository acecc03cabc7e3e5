"""`midlogit report`: its options, and what it writes; the report itself knows the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from midlogit.cli.console import write_text
from midlogit.errors import InvalidRequest
from midlogit.extras import require


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is written of a report.

    Attributes:
        page: the page. json: its numbers beside it. figures: the folder of its pictures.
        trackio, wandb: projects that it is logged to.
    """

    page: Path
    static: bool
    json: bool
    figures: Path | None
    trackio: str | None
    wandb: str | None


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN [RUN2]",
            help="Folders of batch jobs, or files of `midlogit generate --json`; two are compared.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    static: Annotated[
        bool, typer.Option("--static", help="A page without any script; hovers become titles.")
    ] = False,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also read a random sample of parts, for tables of token types."
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Write every number of the page beside it, as JSON.")
    ] = False,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write each picture as SVG, PDF, PNG and Vega-Lite."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the teacher's tokenizer; by default as the job says."
        ),
    ] = None,
    trackio: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log the numbers to trackio.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log the numbers to Weights & Biases.")
    ] = None,
) -> None:
    """Write a page of what was sampled: α, KL, ESS, lengths, texts, disagreements; or compare two runs."""
    outputs = Outputs(out, static, json, figures, trackio, wandb)
    run_report(runs, outputs, deep=deep, tokenizer=tokenizer)


def run_report(runs: list[Path], outputs: Outputs, *, deep: bool, tokenizer: str | None) -> None:
    """Writes a report and says what was written.

    Raises:
        MidlogitError: as `make_report`. OSError: a file cannot be written.
    """
    from midlogit.jobs.files import write_whole
    from midlogit.report import make_report

    if len(runs) > 2:
        raise InvalidRequest(f"There are {len(runs)} runs.", "Give one, or two to compare.")
    require("vl_convert", "report")
    report = make_report(*runs, deep=deep, tokenizer=tokenizer)

    write_whole(outputs.page, report.page(static=outputs.static).encode())
    written = [str(outputs.page)]
    if outputs.json:
        numbers = outputs.page.with_suffix(".json")
        write_whole(numbers, report.json())
        written.append(str(numbers))
    if outputs.figures is not None:
        files = report.write_figures(outputs.figures)
        written.append(f"{len(files)} files in {outputs.figures}")
    if outputs.trackio is not None:
        report.log_to("trackio", outputs.trackio)
    if outputs.wandb is not None:
        report.log_to("wandb", outputs.wandb)

    heads = [run["head"] for run in report.numbers["runs"]]
    said = " and ".join(f"{head['completions']:,} completions of {head['name']}" for head in heads)
    write_text(f"{', '.join(written)}: {said}.\n")
