"""The parameters in which two jobs differ; knows their manifests, no completion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from midlogit.report.numbers import Numbers
from midlogit.report.results import Results


def differing(first: Results, second: Results) -> list[Numbers]:
    """The parameters in which two jobs differ."""
    if first.manifest is None or second.manifest is None:
        return []
    one, two = (
        dict(
            _flat(manifest.parameters | {"inputs": sorted(manifest.parameters["inputs"].values())})
        )
        for manifest in (first.manifest, second.manifest)
    )
    return [
        {"name": name, "first": one.get(name), "second": two.get(name)}
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    else:
        yield name, value
