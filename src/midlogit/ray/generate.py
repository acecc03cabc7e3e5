"""A callable class that samples completions inside a Ray Data pipeline; knows Arrow tables, no files and no jobs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from midlogit.errors import EngineFailure, InvalidRequest, ServerUnavailable
from midlogit.extras import require
from midlogit.jobs import PairSource
from midlogit.jobs.schema import PLANNED_COLUMNS, Layout, Record, record_column, record_of
from midlogit.messages import TemplateOptions
from midlogit.outputs import Completion
from midlogit.params import DEFAULT_PRESET, SamplingParams
from midlogit.ray.actors import end_actor
from midlogit.requests.prompts import Reading
from midlogit.requests.sequence import Request

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ATTEMPTS = 3  # of a block on a new engine each


class Generate:
    """Samples completions of the rows of a dataset; for `map_batches` with `batch_format="pyarrow"`.

    Each output row is one completion: the input's columns, then `sample`, `seed`, `text`, `token_ids`, `finish_reason`,
    `error` and the diagnostics (docs/batch.md). A row that cannot be honoured has an `error` and no text. Rows come
    in the order of the input, the n samples of each together.

    With a seed, the tokens of a row depend on the seed, its id and its prompts alone: not on how the dataset is divided
    into blocks, nor on how often Ray runs a block. Two rows of one id and one prompt are the same request.

    When an engine breaks, its actor ends and Ray runs the block again in a new one; a block that breaks three engines
    fails the dataset.

    Args:
        source: the models and the engine; None for the bundled pair.
        params: the balanced preset when left out; `seed` and `id_column` come together.
        prompt_column: text, chat messages or token ids; the teacher's prompt where the base has its own.
        base_prompt_column: the base's prompt; None for the same, as is a null.
        id_column: a name per row, unique in the dataset.
        chat, chat_template_kwargs: as of `Pair.generate`.

    Raises:
        InvalidRequest: a parameter that cannot be honoured. MidlogitError: as `PairSource.open`.
    """

    def __init__(
        self,
        source: PairSource | None = None,
        *,
        params: SamplingParams | None = None,
        prompt_column: str = "prompt",
        base_prompt_column: str | None = None,
        id_column: str | None = None,
        chat: bool = False,
        chat_template_kwargs: TemplateOptions | None = None,
    ) -> None:
        require("pyarrow", "ray")
        self._params = params or SamplingParams.preset(DEFAULT_PRESET)
        if (self._params.seed is None) != (id_column is None):
            raise InvalidRequest(
                "A seed needs ids of the rows, and ids need a seed.",
                "Give params.seed and id_column, or neither.",
            )

        self._columns = (prompt_column, base_prompt_column, id_column)
        self._id_column = id_column
        self._reading = Reading(chat, chat_template_kwargs)
        self._pair = (source or PairSource()).open(seeded=id_column is not None)
        self._pair.mixing.outcomes(self._params)  # refuses ids outside the vocabulary at once

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yields the completions of the first rows as soon as all of theirs have ended, and so on to the last row.

        The order is the input's: Ray tells the outputs of a repeated call apart by their number alone, so that some
        would be lost and some doubled if completions came in the order in which they end.
        """
        import pyarrow as pa

        if not isinstance(table, pa.Table):
            raise InvalidRequest(
                f"Generate reads Arrow tables, not {type(table).__name__}.",
                'Call map_batches with batch_format="pyarrow".',
            )
        layout = Layout("full", self._params.top_logprobs, pa.schema([]))
        fields = [field for field in layout.schema if field.name not in PLANNED_COLUMNS]
        _require_columns(table, self._columns, fields)

        first, finished = 0, dict[int, list[Record]]()
        for index, records in self._rows(table, layout):
            finished[index] = records
            last = first
            while last in finished:
                last += 1
            if last > first:
                yield _output(table, first, [finished.pop(n) for n in range(first, last)], fields)
                first = last

    def _rows(self, table: pa.Table, layout: Layout) -> Iterator[tuple[int, list[Record]]]:
        """Yields (row, records of its n samples), each row as soon as all its completions have ended."""
        requests: dict[tuple[int, int], Request] = {}
        records: defaultdict[int, list[Record]] = defaultdict(list)
        try:
            for index, of_row in enumerate(self._requests(table)):
                requests |= {(index, request.sample): request for request in of_row}
            for completion in self._run(list(requests.values())):
                index, sample = completion.index, completion.sample
                records[index].append(
                    record_of(completion, requests.pop((index, sample)).seed, layout)
                )
                if len(records[index]) == self._params.n:
                    yield index, sorted(records.pop(index), key=lambda record: record["sample"])
        except (EngineFailure, ServerUnavailable) as failure:
            end_actor(failure, most_attempts=MOST_ATTEMPTS)

    def _requests(self, table: pa.Table) -> Iterator[list[Request]]:
        """Yields the requests of each row.

        Rows are prepared one by one, so that repeated ones are the same request wherever a block ends.
        """
        prompts, base_prompts, ids = (
            [None] * len(table) if name is None else table.column(name).to_pylist()
            for name in self._columns
        )
        for index, (prompt, base_prompt, row_id) in enumerate(
            zip(prompts, base_prompts, ids, strict=True)
        ):
            requests = self._pair.prepare(
                [prompt],
                self._params,
                self._reading,
                base_prompts=[prompt if base_prompt is None else base_prompt],
                request_ids=None if self._id_column is None else [str(row_id)],
                strict=False,
            )
            error = requests[0].error
            if self._id_column is not None and row_id is None:
                error = f"Its {self._id_column!r} is null."
            yield [replace(request, index=index, error=error) for request in requests]

    def _run(self, requests: list[Request]) -> Iterator[Completion]:
        """Yields completions as they end.

        Raises:
            EngineFailure: the engine broke.
        """
        batch = self._pair.start(requests)
        try:
            for completion in batch:
                if completion.error_type == "engine":
                    raise EngineFailure(str(completion.error))
                yield completion
        finally:
            batch.abort()  # what still runs when Ray drops the call


def _require_columns(
    table: pa.Table, needed: Sequence[str | None], fields: Sequence[pa.Field]
) -> None:
    """Refuses a table without the columns that are read, or with columns named as those that are added.

    Raises:
        InvalidRequest: names them.
    """
    missing = [name for name in needed if name is not None and name not in table.column_names]
    if missing:
        raise InvalidRequest(
            f"The dataset has no column {missing[0]!r}.",
            f"Its columns are {', '.join(map(repr, table.column_names))}.",
        )
    clash = [field.name for field in fields if field.name in table.column_names]
    if clash:
        raise InvalidRequest(
            f"The dataset has columns that Generate adds: {', '.join(map(repr, clash))}.",
            "Rename them, as by rename_columns.",
        )


def _output(
    table: pa.Table, first: int, rows: Sequence[Sequence[Record]], fields: Sequence[pa.Field]
) -> pa.Table:
    """The output of consecutive rows from `first` on: the input's columns, then those of the records."""
    import pyarrow as pa

    numbers = [first + offset for offset, records in enumerate(rows) for _ in records]
    output = table.take(pa.array(numbers, pa.int64()))
    flat = [record for records in rows for record in records]
    for field in fields:
        output = output.append_column(field, record_column(field, flat))
    return output
