"""A report of one run or two: reads once, then writes pages, numbers and pictures; knows the order of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from midlogit import __version__
from midlogit.report.charts import pictures
from midlogit.report.coloured import Coloured
from midlogit.report.compare import comparison
from midlogit.report.compare_charts import compared_pictures
from midlogit.report.compare_page import compare_page
from midlogit.report.drawing import write_figures
from midlogit.report.numbers import run_numbers
from midlogit.report.page import run_page
from midlogit.report.picture import Picture
from midlogit.report.results import Results, open_results
from midlogit.report.texts import Text, chosen_texts, places, token_types
from midlogit.report.tokens import TokenTexts, token_texts
from midlogit.report.tracking import Tracker, log_run


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        numbers: all that its page says, as JSON data: `runs`, and `comparison` of two.
    """

    numbers: dict[str, Any]
    _results: Sequence[Results]
    _texts: Sequence[Sequence[Text]]
    _names: TokenTexts

    @property
    def pictures(self) -> list[Picture]:
        """Its pictures, in the order of the page."""
        runs, compared = self.numbers["runs"], self.numbers["comparison"]
        return pictures(runs) + (compared_pictures(compared, runs) if compared else [])

    def page(self, *, static: bool = False) -> str:
        """The page, one file of HTML that asks for nothing else.

        Args:
            static: without any script; what hovering shows is in titles.

        Raises:
            MissingExtra: vl-convert is not installed.
        """
        coloured = Coloured(self._names, titles=static)
        runs = self.numbers["runs"]
        if self.numbers["comparison"] is None:
            return run_page(runs[0], self._texts[0], coloured, self.pictures, static=static)
        return compare_page(self.numbers, self._texts, coloured, self.pictures, static=static)

    def json(self) -> bytes:
        """The numbers as JSON; infinities are null."""
        return (
            orjson.dumps(self.numbers, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS) + b"\n"
        )

    def write_figures(self, folder: str | Path) -> list[Path]:
        """Writes each picture as SVG, PDF, PNG and Vega-Lite.

        Raises:
            MissingExtra: vl-convert is not installed. OSError: the folder cannot be written.
        """
        return write_figures(self.pictures, Path(folder))

    def log_to(self, tracker: Tracker, project: str) -> None:
        """Logs the numbers, histograms and some rows of each run to a project.

        Args:
            tracker: "trackio" or "wandb".

        Raises:
            MissingExtra: it is not installed.
        """
        for run, results in zip(self.numbers["runs"], self._results, strict=True):
            log_run(tracker, project, run, results)


def make_report(
    run: str | Path,
    other: str | Path | None = None,
    *,
    deep: bool = False,
    tokenizer: str | Path | None = None,
) -> Report:
    """Reads a run, or two to compare.

    Args:
        run, other: folders of batch jobs, or files of `midlogit generate --json`.
        deep: also read the per-token lists of a random sample of parts, for what token types carry.
        tokenizer: folder or hub id of the teacher's tokenizer; by default the one that the job names, if it is here.

    Raises:
        InvalidRequest: no such run or tokenizer, or a damaged file. MissingExtra: pyarrow is not installed.
    """
    results = [open_results(path) for path in (run, other) if path is not None]
    names = token_texts(results[0].manifest, tokenizer)
    texts = [chosen_texts(of_run, names) for of_run in results]
    numbers = {
        "midlogit": __version__,
        "runs": [
            run_numbers(
                of_run, shown, places(of_run, names), _types(of_run, names) if deep else None
            )
            for of_run, shown in zip(results, texts, strict=True)
        ],
        "comparison": comparison(*results) if len(results) == 2 else None,
    }
    return Report(numbers, results, texts, names)


def _types(results: Results, names: TokenTexts) -> dict[str, Any] | None:
    return token_types(results, results.sampled_parts(), names) if results.has_lists else None
