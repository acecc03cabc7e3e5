"""Reads the prompts of a batch job, row by row: text, JSON lines, OpenAI batch files, Parquet, `datasets` folders."""

from midlogit.jobs.inputs.overrides import require_reading, with_overrides
from midlogit.jobs.inputs.reading import read_rows
from midlogit.jobs.inputs.row import Columns, Row

__all__ = ["Columns", "Row", "read_rows", "require_reading", "with_overrides"]
