"""Draws the pictures of docs/report.md: three small jobs of the bundled pair, and `midlogit report` on them.

python docs/make_report.py FOLDER [--servers BASE,TEACHER]

FOLDER keeps the jobs, so that another run of the script only draws. The servers are two `vllm serve` of the bundled
base and teacher; without them the pictures of truncated lists stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from midlogit import SamplingParams
from midlogit.jobs import Job, JobOptions, PairSource
from midlogit.report import Report, make_report
from midlogit.requests.prompts import Reading

PICTURES = Path(__file__).parent / "report"
WHO = "fox bear cat dog bird fish rabbit horse cow frog duck mouse lion girl boy king queen robot tree boat"
WHERE = "forest sea garden house river castle school mountain"
OF_TWO = ("effects", "together", "difference_alpha")  # pictures of two runs
OF_LISTS = ("coverage", "bounds")  # of truncated lists


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--servers")
    given = parser.parse_args()

    stories = given.folder / "stories.jsonl"
    given.folder.mkdir(parents=True, exist_ok=True)
    prompts = [
        f"Tell me a story about a {who} in a {where}."
        for where in WHERE.split()
        for who in WHO.split()
    ]
    rows = [{"id": f"story-{k:03}", "prompt": prompt} for k, prompt in enumerate(prompts)]
    stories.write_text("".join(json.dumps(row) + "\n" for row in rows))

    local = PairSource("local", options={"max_num_seqs": 64})
    runs = [
        run(
            local,
            given.folder / preset,
            stories,
            SamplingParams.preset(preset, n=4, seed=0, max_tokens=160),
        )
        for preset in ("balanced", "exploratory")
    ]
    one, two = make_report(runs[0]), make_report(*runs)
    keep(one, [p.name for p in one.pictures])
    keep(two, OF_TWO)

    if given.servers:
        base, teacher = given.servers.split(",")
        served = PairSource("http", base, teacher, {"top_k": 20})
        params = SamplingParams.preset("exploratory", n=1, seed=0, max_tokens=96)
        keep(make_report(run(served, given.folder / "served", stories, params)), OF_LISTS)


def run(source: PairSource, folder: Path, stories: Path, params: SamplingParams) -> Path:
    """Works on a job until it is complete."""
    job = Job.plan(
        [stories], folder, source, JobOptions(params, Reading(chat=True), rows_per_part=40)
    )
    if job.missing():
        with source.open() as pair:
            job.run(pair)
    return folder


def keep(report: Report, names: list[str] | tuple[str, ...]) -> None:
    """Writes the SVG of some pictures of a report into docs."""
    scratch = PICTURES / "scratch"
    PICTURES.mkdir(exist_ok=True)
    report.write_figures(scratch)
    for name in names:
        shutil.copy(scratch / f"{name}.svg", PICTURES / f"{name}.svg")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
