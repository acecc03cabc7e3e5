"""Draws the same completions with two commits and compares their tokens; knows the public API only.

    python -m benchmarks.same_tokens OLD NEW [--engines local,vllm,http] [--completions 200]

OLD and NEW are commits; "." or WORKTREE is the working tree. Each commit draws the completions of
`benchmarks.draw_tokens`, in one process per engine and case. Token ids, text, finish_reason and stop_reason must be
equal, and diagnostics within 1e-3; exits with 1 where they are not.

Results of commits are kept in .cache/same-tokens, by commit and by the content of draw_tokens.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import draw_tokens
from benchmarks.draw_tokens import CASES, ENGINES, EXACT, SERVER_FLAGS

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".cache" / "same-tokens"
WORKING_TREE = (".", "WORKTREE")

TOLERANCE = (
    1e-3  # of diagnostics, which depend on the batch where a case runs several calls at once
)
NAMED = ("alpha", "logprobs")  # diagnostics with a column of their own in the table
HEAD = (
    *("engine", "case", "drafts accepted", "completions", "tokens", "equal"),
    *("Δ alpha", "Δ logprobs", "Δ others", "first difference"),
)


# Trees, servers, kept results


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit; the working tree itself where that is asked for."""
    if commit in WORKING_TREE:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="same-tokens-") as folder:
        tree = Path(folder).resolve() / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


class Servers(ExitStack):
    """A server of each bundled model, started when their URLs are first asked for."""

    @cached_property
    def urls(self) -> list[str]:
        from tests.http.servers import serving

        bundled = ROOT / "src" / "midlogit" / "bundled"
        return self.enter_context(
            serving(bundled / "base", bundled / "teacher", flags=SERVER_FLAGS)
        )


def run_child(
    engine: str, case: str, completions: int, tree: Path, servers: Servers
) -> dict[str, Any]:
    """What a child process draws with the files of a tree."""
    from tests.http.servers import install

    python = install() if engine == "vllm" else sys.executable
    urls = servers.urls if engine == "http" else []
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "drawn.json"
        arguments = [engine, case, str(completions), str(tree / "src"), str(output), *urls]
        child = subprocess.run(
            [python, "-m", "benchmarks.draw_tokens", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if child.returncode:
            raise SystemExit(
                f"{engine} {case} of {tree} failed:\n{(child.stdout + child.stderr)[-6000:]}"
            )
        return json.loads(output.read_text())


def results(
    commit: str, options: argparse.Namespace, servers: Servers
) -> dict[tuple[str, str], dict[str, Any]]:
    """What a commit drew, by engine and case; kept results are read unless they are to be computed anew."""
    drawing = hashlib.sha256(Path(draw_tokens.__file__).read_bytes()).hexdigest()[:12]
    kept = None if commit in WORKING_TREE else KEPT / f"{commit}-{drawing}-{options.completions}"
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with ExitStack() as stack:
        tree = None
        for engine in options.engines:
            for case in CASES:
                file = kept and kept / f"{engine}-{case}.json"
                if file and file.exists() and not options.recompute:
                    found[engine, case] = json.loads(file.read_text())
                    print(f"{commit[:12]} {engine} {case}: kept", flush=True)
                    continue

                tree = tree or stack.enter_context(checked_out(commit))
                start = time.perf_counter()
                found[engine, case] = run_child(engine, case, options.completions, tree, servers)
                print(
                    f"{commit[:12]} {engine} {case}: {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(found[engine, case]))
    return found


# Comparison


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Where a completion differs from the other commit's; None where it is the same."""
    ids = (old["token_ids"], new["token_ids"])
    if ids[0] != ids[1]:
        place = common_length(*ids)
        was, now = (of[place] if place < len(of) else "none" for of in ids)
        return f"{new['where']}: token {place} is {now}, was {was}"
    for name in EXACT[1:]:
        if old[name] != new[name]:
            return f"{new['where']}: {name} is {new[name]!r}, was {old[name]!r}"
    for name, value in differences(old, new).items():
        if value > TOLERANCE:
            return f"{new['where']}: {name} differs by {value:.1e}"
    return None


def common_length(old: list[int], new: list[int]) -> int:
    """The number of tokens before the first different one."""
    pairs = zip(old, new, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))


def distance(old: float, new: float) -> float:
    """The difference of two numbers, relative to the old one where that is above 1."""
    if old == new or (math.isnan(old) and math.isnan(new)):
        return 0.0
    if not (math.isfinite(old) and math.isfinite(new)):
        return math.inf
    return abs(old - new) / max(1.0, abs(old))


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each diagnostic that both commits have, over the tokens before the first different."""
    places = common_length(old["token_ids"], new["token_ids"])
    before, after = old["diagnostics"], new["diagnostics"]
    return {
        name: max(map(distance, before[name][:places], after[name][:places]), default=0.0)
        for name in before.keys() & after.keys()
    }


def compare(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """The cells of a line of the table from completions on, and whether all is equal."""
    if len(old) != len(new):
        return [f"{len(new)}, were {len(old)}", *[""] * 6], False

    found = [first_difference(a, b) for a, b in zip(old, new, strict=True)]
    largest: dict[str, float] = {}
    for a, b in zip(old, new, strict=True):
        for name, value in differences(a, b).items():
            largest[name] = max(largest.get(name, 0.0), value)

    others = max((value for name, value in largest.items() if name not in NAMED), default=0.0)
    figures = [f"{x:.1e}" for x in (*(largest[name] for name in NAMED), others)]
    tokens = sum(len(completion["token_ids"]) for completion in old)
    first = next((difference for difference in found if difference), "-")
    return [str(len(old)), str(tokens), str(found.count(None)), *figures, first], not any(found)


def table(
    old: dict[tuple[str, str], dict[str, Any]], new: dict[tuple[str, str], dict[str, Any]]
) -> tuple[list[list[str]], bool]:
    """A line for each engine and case, and whether all is equal; accepted drafts are reported, not compared."""
    lines, equal = [list(HEAD)], True
    for (engine, case), before in old.items():
        after = new[engine, case]
        cells, same = compare(before["completions"], after["completions"])
        counts = [str(before["accepted"]), str(after["accepted"])]
        accepted = counts[0] if counts[0] == counts[1] else " → ".join(counts)
        lines.append([engine, case, accepted, *cells])
        equal &= same

        if before["scores"]:
            cells, same = compare(before["scores"], after["scores"])
            lines.append([engine, "scores", "-", *cells])
            equal &= same
    return lines, equal


def print_table(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--engines", default=",".join(ENGINES), type=lambda names: names.split(","))
    parser.add_argument("--completions", type=int, default=200, help="per engine and case")
    parser.add_argument(
        "--recompute", action="store_true", help="compute both commits again, and keep the results"
    )
    options = parser.parse_args()
    if unknown := set(options.engines) - set(ENGINES):
        parser.error(f"unknown engines {', '.join(unknown)}; choose from {', '.join(ENGINES)}")

    commits = [
        name if name in WORKING_TREE else git("rev-parse", "--verify", f"{name}^{{commit}}")
        for name in (options.old, options.new)
    ]
    with Servers() as servers:
        old, new = (results(commit, options, servers) for commit in commits)
    lines, equal = table(old, new)
    print_table(lines)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
