"""The options of a job, and which of them its results depend on; reads no input and opens no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from midlogit.errors import InvalidRequest
from midlogit.jobs.inputs import Columns
from midlogit.jobs.manifest import reading_facts, sampling_facts
from midlogit.jobs.schema import LEVELS, DiagnosticsLevel
from midlogit.kinds import require_count
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Reading

COMPLETIONS_PER_PART = 1024


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job does with its rows.

    Attributes:
        params: sampling parameters of rows without any of their own; without a seed, 0 is taken.
        reading: how prompts are read. columns, encoding: how the input is.
        diagnostics: what is stored per token: "full", "compact" or "none".
        rows_per_part: rows of a part; by default so many that a part has about 1,024 completions.
        max_errors: most completions that may end as errors, as a number or a share such as "1%".
    """

    params: SamplingParams = field(default_factory=lambda: SamplingParams.preset("balanced"))
    reading: Reading = field(default_factory=Reading)
    columns: Columns = field(default_factory=Columns)
    encoding: str = "utf-8"
    diagnostics: DiagnosticsLevel = "full"
    rows_per_part: int | None = None
    max_errors: str | int = "1%"

    def __post_init__(self) -> None:
        if self.rows_per_part is not None:
            require_count(rows_per_part=self.rows_per_part)
        if self.diagnostics not in LEVELS:
            raise InvalidRequest(
                f"diagnostics is {self.diagnostics!r}.", f"Use {', '.join(LEVELS)}."
            )
        if self.params.return_support:
            raise InvalidRequest("A job does not store supports.", "Leave return_support out.")
        allowed_errors(self.max_errors, 0)

    @property
    def part_size(self) -> int:
        """Rows of each part."""
        return self.rows_per_part or max(COMPLETIONS_PER_PART // self.params.n, 1)


def allowed_errors(given: str | int, items: int) -> int:
    """The number of completions that `max_errors` allows of `items`.

    Raises:
        InvalidRequest: neither a number nor a share in percent.
    """
    text = str(given).strip()
    try:
        if text.endswith("%") and 0 <= float(text[:-1]) <= 100:
            return int(items * float(text[:-1]) / 100)
        if int(text) >= 0:
            return int(text)
    except ValueError:
        pass
    raise InvalidRequest(f"max_errors is {given!r}.", "Give a number, or a share such as 1%.")


def job_parameters(
    inputs: Mapping[str, str], facts: Mapping[str, Any], options: JobOptions
) -> dict[str, Any]:
    """Everything that the results of a job depend on, as JSON data.

    Args:
        inputs: digests of the input files by name. facts: of the pair (`PairSource.facts`).
    """
    columns = options.columns
    return {
        "inputs": dict(inputs),
        "columns": {
            "id": columns.id,
            "prompt": columns.prompt,
            "base_prompt": columns.base_prompt,
        },
        "encoding": options.encoding,
        **facts,
        "sampling": sampling_facts(options.params),
        "reading": reading_facts(options.reading),
        "diagnostics": options.diagnostics,
        "rows_per_part": options.part_size,
    }
