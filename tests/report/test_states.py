"""Runs that are not whole: still written to, without diagnostics, of one row, of errors, empty, of an older version."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from midlogit.cli.main import app
from midlogit.errors import InvalidRequest, MissingExtra
from midlogit.jobs.journal import Journal
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.open_part import layout_of
from midlogit.jobs.part_files import read_metadata, read_part, write_part
from midlogit.jobs.schema import FLAG_LISTS, FLOAT_LISTS, TOP_COLUMNS, records_of
from midlogit.jobs.summary import summarize
from midlogit.report import make_report
from tests.report.conftest import N

PART = "part-00000.parquet"
Change = Callable[[pa.Table], pa.Table]


@pytest.fixture
def copy(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of a job."""
    shutil.copytree(runs[0], tmp_path / "RUN")
    return tmp_path / "RUN"


def rewrite(run: Path, change: Change, *, version: int | None = 2, **facts: Any) -> None:
    """Changes the first part and drops the others.

    Args:
        version: of the summaries. facts: fields of the manifest.
    """
    path = run / "data" / PART
    table, metadata = change(read_part(path)), read_metadata(path)
    metadata |= {"summary": summarize(table), "summary_version": version}
    write_part(path, run / "tmp", table, metadata, replace=True)
    for other in (run / "data").glob("*.parquet"):
        if other != path:
            other.unlink()
    file = run / "plan" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parts": 1} | facts))


def test_a_job_that_is_still_written_to(copy: Path) -> None:
    """Two of its three parts are done, one is open."""
    manifest = Manifest.read(copy / "plan" / "manifest.json")
    opened = copy / "data" / "part-00002.parquet"
    table = read_part(opened)
    rows = read_part(copy / "plan" / "part-00002.parquet")
    records = records_of(table, layout_of(manifest, rows.schema))
    journal = Journal(copy / "journal", 2)
    for record in records[: N - 1]:
        journal.append(0, record)
    journal.close()
    opened.unlink()

    report = make_report(copy)
    head = report.numbers["runs"][0]["head"]
    assert (head["parts_done"], head["parts_open"], head["completions"]) == (2, 1, 4 * N + N - 1)
    page = report.page(static=True)
    assert "The job is not complete" in page and "no worker is at it now" in page


def test_nothing_is_finished(copy: Path) -> None:
    shutil.rmtree(copy / "data")
    report = make_report(copy, deep=True)
    assert "No completion is finished yet" in report.page()
    assert report.pictures == []
    assert "nothing to compare" in make_report(copy, copy).page()


def test_no_diagnostics(copy: Path) -> None:
    parameters = json.loads((copy / "plan" / "manifest.json").read_text())["parameters"]
    drop = [*FLOAT_LISTS, *FLAG_LISTS, *TOP_COLUMNS]
    rewrite(
        copy,
        lambda table: table.drop_columns(drop),
        parameters=parameters | {"diagnostics": "none"},
    )
    report = make_report(copy, deep=True)
    run = report.numbers["runs"][0]
    assert run["alpha"] is run["kl"] is run["exactness"] is run["disagreements"] is None
    assert run["ess"]["per_token"] is None and run["ess"]["sequences"]["count"] == 2 * N
    assert "stored no diagnostics per token" in report.page(static=True)
    compared = make_report(copy, copy).numbers["comparison"]
    assert compared["by_position"] is None and compared["texts"]["identical"] == 1


def test_one_row(copy: Path) -> None:
    rewrite(copy, lambda table: table.slice(0, 1), rows=1, items=1)
    report = make_report(copy)
    run = report.numbers["runs"][0]
    assert run["alpha"]["mean"]["low"] is None and run["lengths"]["identical"]["share"] is None
    assert "There is one row" in report.page(static=True)
    assert make_report(copy, copy).numbers["comparison"]["metrics"][0]["p"] is None


def test_only_errors(copy: Path) -> None:
    def fail(table: pa.Table) -> pa.Table:
        message = pa.array(
            [f"input.jsonl:{n}: too long: {n + 1000} tokens" for n in range(len(table))]
        )
        at = table.schema.get_field_index("error")
        return table.set_column(at, table.schema.field(at), message)

    rewrite(copy, fail, items=2 * N)
    report = make_report(copy, deep=True)
    (kind,) = report.numbers["runs"][0]["errors"]["kinds"]
    assert kind["kind"] == "too long: N tokens" and kind["count"] == 2 * N
    assert len(kind["examples"]) == 5
    assert "too long: N tokens" in report.page()


def test_summaries_of_an_older_version_are_made_again(copy: Path, runs: tuple[Path, Path]) -> None:
    for path in (copy / "data").glob("*.parquet"):
        metadata = read_metadata(path)
        del metadata["summary_version"]
        metadata["summary"] = {"completions": 0}
        write_part(path, copy / "tmp", read_part(path), metadata, replace=True)
    again, before = make_report(copy).numbers["runs"][0], make_report(runs[0]).numbers["runs"][0]
    assert (
        again["head"].pop("summaries_remade") == 3 and before["head"].pop("summaries_remade") == 0
    )
    assert again == before


def test_what_is_no_run(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no job"):
        make_report(tmp_path / "nothing")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "A fox"}\n')
    with pytest.raises(InvalidRequest, match=r"lines.jsonl:1 is no line"):
        make_report(lines)
    with pytest.raises(InvalidRequest, match=r"holds no tokenizer.json"):
        make_report(copy, tokenizer=tmp_path)
    (copy / "data" / PART).write_bytes(b"torn")
    with pytest.raises(InvalidRequest, match="damaged part"):
        make_report(copy)


def test_the_command(copy: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    page, figures = tmp_path / "page.html", tmp_path / "figures"
    line = ["report", str(copy), "-o", str(page), "--static", "--json", "--figures", str(figures)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "<script" not in text and "http://" not in text.replace("http://www.w3.org", "")
    assert json.loads(page.with_suffix(".json").read_text())["runs"][0]["head"]["rows"] == 6
    kinds = {path.name.partition(".")[2] for path in figures.iterdir()}
    assert kinds == {"svg", "pdf", "png", "vl.json"}
    assert all(path.stat().st_size > 1000 for path in figures.iterdir())


def test_docs_say_how_each_picture_is_read(runs: tuple[Path, Path]) -> None:
    """docs/report.md has every picture but those of other positions, with the words of the page."""
    docs = Path(__file__).parents[2] / "docs" / "report.md"
    text = " ".join(docs.read_text().replace("`", "").split())
    shown = [*make_report(runs[0]).pictures, *make_report(*runs).pictures]
    for picture in shown:
        assert picture.caption in text, picture.name
        if picture.name not in ("difference_kl_base", "difference_entropy"):
            assert f"report/{picture.name}.svg" in text


def test_logging_to_a_tracker(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """trackio and wandb take the same calls; one that is not installed is named."""
    logged: dict[str, Any] = {}
    tracker = types.ModuleType("trackio")
    tracker.init = lambda **given: logged.update(given)  # type: ignore[attr-defined]
    tracker.log = logged.update  # type: ignore[attr-defined]
    tracker.finish = lambda: logged.update(finished=True)  # type: ignore[attr-defined]
    tracker.Histogram = dict  # type: ignore[attr-defined]
    tracker.Table = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setitem(sys.modules, "wandb", None)

    report = make_report(runs[0])
    report.log_to("trackio", "stories")
    run = report.numbers["runs"][0]
    assert (logged["project"], logged["name"], logged["finished"]) == ("stories", "RUN", True)
    assert logged["alpha/mean/mean"] == run["alpha"]["mean"]["mean"]
    shares, edges = logged["alpha"]["np_histogram"]
    assert len(edges) == len(shares) + 1 and shares.sum() == pytest.approx(1)
    assert len(logged["examples"]["data"]) == 5 * N
    with pytest.raises(MissingExtra, match="pip install wandb"):
        report.log_to("wandb", "stories")
