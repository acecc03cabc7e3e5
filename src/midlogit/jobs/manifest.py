"""The manifest of a job: its parameters and their fingerprint, written once; knows no rows and no results.

A job goes on only with the parameters that it began with. Those that differ are named field by field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from midlogit.core.rules import parse_rule
from midlogit.errors import InvalidRequest
from midlogit.jobs.schema import DiagnosticsLevel
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Reading

SCHEMA_VERSION = 3
SHOWN_FIELDS = 8


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a job is.

    Attributes:
        parameters: everything that its results depend on, as JSON data: inputs, models, engine, sampling, reading.
        rows, items, parts: numbers of input rows, of completions to make, and of parts.
        error_rows: rows that the plan found wrong.
        rows_per_part: rows of each part but the last.
        created: when it was planned, ISO 8601. version: of midlogit that planned it.
        base, teacher: the models' names as they were given, for readers; results depend on the digests in `parameters`.
            Empty in jobs of older versions.
    """

    parameters: dict[str, Any]
    rows: int
    items: int
    parts: int
    error_rows: int
    rows_per_part: int
    created: str
    version: str
    schema_version: int = SCHEMA_VERSION
    base: str = ""
    teacher: str = ""

    @property
    def fingerprint(self) -> str:
        """A digest of the parameters."""
        return hashlib.sha256(_canonical(self.parameters)).hexdigest()[:32]

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters of rows without any of their own."""
        return params_of(self.parameters["sampling"])

    @property
    def reading(self) -> Reading:
        """How prompts are read."""
        given = dict(self.parameters["reading"])
        variables = given.pop("chat_template_kwargs")
        return Reading(chat_template_kwargs=variables and tuple(variables), **given)

    @property
    def diagnostics(self) -> DiagnosticsLevel:
        """What is stored per token."""
        level: DiagnosticsLevel = self.parameters["diagnostics"]
        return level

    def to_json(self) -> bytes:
        """The manifest as a file."""
        data = {**asdict(self), "fingerprint": self.fingerprint}
        return json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest.

        Raises:
            InvalidRequest: not a manifest, or one of another schema.
        """
        try:
            data = json.loads(path.read_bytes())
            version = data["schema_version"]
            data.pop("fingerprint")
        except (ValueError, KeyError, TypeError):
            raise InvalidRequest(f"{path} is damaged.", "Plan the job again elsewhere.") from None

        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            raise InvalidRequest(
                f"{path} was written by midlogit {data.get('version')} in schema {version},"
                f" and this one knows schema {SCHEMA_VERSION}.",
                "Upgrade midlogit."
                if newer
                else "Use that version; any reader of Parquet can read its data.",
            )
        return cls(**data)

    def require_same(self, parameters: Mapping[str, Any], run: Path) -> None:
        """Refuses parameters that differ from those that the job began with.

        Raises:
            InvalidRequest: names the fields that differ, with both values.
        """
        before, now = dict(_flat(self.parameters)), dict(_flat(parameters))
        differing = [
            f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differing:
            more = f"; and {len(differing) - SHOWN_FIELDS} more" * (len(differing) > SHOWN_FIELDS)
            raise InvalidRequest(
                f"{run} is a job of other parameters: {'; '.join(differing[:SHOWN_FIELDS])}{more}.",
                "Give the parameters it began with, or another --out.",
            )


def sampling_facts(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as JSON data.

    Raises:
        InvalidRequest: a rule for α that has no name on the command line.
    """
    spec = params.alpha_rule.spec
    if parse_rule(spec) != params.alpha_rule:
        raise InvalidRequest(f"A job cannot name the rule {spec!r}.", "Use one of midlogit's own.")
    data = asdict(params) | {"alpha_rule": spec}
    return json.loads(json.dumps(data))  # type: ignore[no-any-return]


def params_of(facts: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters that `sampling_facts` described."""
    return SamplingParams(**{**facts, "alpha_rule": parse_rule(facts["alpha_rule"])})


def reading_facts(reading: Reading) -> dict[str, Any]:
    """The options of reading prompts as JSON data, template variables as [base's, teacher's]."""
    given = reading.chat_template_kwargs
    both = given if isinstance(given, tuple) or given is None else (given, given)
    return {
        "chat": reading.chat,
        "chat_template_kwargs": both and [dict(side or {}) for side in both],
        "add_special_tokens": reading.add_special_tokens,
    }


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each leaf."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
