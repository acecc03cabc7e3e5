"""The ids of a job's prompts, encoded again as when they were sampled from; knows the teacher's files, no weights.

A job keeps digests of the tokenizer and chat template that it used, and the number of tokens of each prompt. Another
tokenizer than the job's is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from midlogit.errors import InvalidRequest
from midlogit.jobs.exports.results import Results
from midlogit.jobs.schema import prompt_of
from midlogit.jobs.source import tokenizer_facts
from midlogit.messages import of_each_side
from midlogit.models.checkpoint import Checkpoint, bundled
from midlogit.requests.prompts import Reader

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads stored prompts as the teacher did."""

    reader: Reader

    @classmethod
    def open(cls, results: Results, tokenizer: str | Path | None) -> PromptReader:
        """Opens the teacher's tokenizer.

        Args:
            tokenizer: folder or hub id; None for the bundled teacher's.

        Raises:
            InvalidRequest: not the one that the job used.
            ModelUnavailable: it cannot be opened.
        """
        reading, teacher = results.manifest.reading, results.manifest.parameters["teacher"]
        model = Checkpoint.open(
            bundled("teacher") if tokenizer is None else tokenizer,
            teacher.get("chat_template_name"),
        )
        differing = [
            name.replace("_", " ")
            for name, digest in tokenizer_facts(model).items()
            if teacher.get(name, digest) != digest
        ]
        if differing:
            raise InvalidRequest(
                f"The {' and the '.join(differing)} of {model.name} is not the job's.",
                "Name the teacher's folder: --tokenizer.",
            )
        variables = of_each_side(reading.chat_template_kwargs)[1]
        return cls(Reader("teacher", model, reading, variables, 0))

    def read(self, table: pa.Table) -> list[list[int]]:
        """The ids of each prompt.

        Raises:
            InvalidRequest: a prompt has another number of tokens than when it was sampled from.
        """
        names = ("row_id", "prompt", "prompt_form", "prompt_tokens")
        found: list[list[int]] = []
        last: tuple[str, str] | None = None
        for row_id, text, form, count in zip(
            *(table[name].to_pylist() for name in names), strict=True
        ):
            prompt = prompt_of(text, form)
            assert prompt is not None
            ids = found[-1] if (text, form) == last else self.reader.read(prompt, None)
            last = text, form
            if len(ids) != count:
                raise InvalidRequest(
                    f"The prompt of row {row_id!r} has {len(ids)} tokens, and had {count} when it was sampled from.",
                    "Name the teacher's folder: --tokenizer.",
                )
            found.append(ids)
        return found
