"""Whether midlogit runs, and its tests import, on the newest releases of what they need; knows packages, no models.

    python -m tests.newest

The environment lies below .cache, apart from the one that constraints.txt fills, and is made anew once a day. Of what
midlogit asks for, torch alone stays as constraints.txt has it. Warnings are errors: a deprecation is a release's
notice of what the next ones break.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "newest"
PYTHON, MADE = FOLDER / "bin" / "python", FOLDER / ".made"
PIP = (PYTHON, "-m", "pip", "--disable-pip-version-check")
EXTRAS = ("batch", "local", "http", "report", "server", "dev")
LINTERS = {"mypy", "ruff"}
A_DAY = 86_400  # seconds
CHECK = """
import pkgutil

import pytest

assert pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider"]) == 0  # imports the tests

import midlogit
from midlogit import Pair, SamplingParams

for module in pkgutil.walk_packages(midlogit.__path__, "midlogit."):
    of_verl = module.name.startswith("midlogit.integrations.verl")  # which verl itself imports
    if not module.name.endswith("__main__") and not of_verl:
        __import__(module.name)
for speculation in ("off", 1):
    with Pair.local(dtype="float32", device="cpu", speculation=speculation) as pair:
        (completion,) = pair.generate(["Hello"], SamplingParams(max_tokens=2, ignore_eos=True), chat=True)
        assert len(completion.token_ids) == 2, completion.error
"""


def requirements() -> list[str]:
    """What midlogit and its tests ask for directly, without torch, which is pinned, and linters, which are not run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    return [line for line in asked if Requirement(line).name not in LINTERS | {"torch"}]


def pins() -> dict[str, str]:
    """The versions of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): pin
        for name, _, pin in (line.partition("==") for line in lines)
        if pin
    }


def is_recent() -> bool:
    """Whether the environment was made within a day, and since the requirements were written."""
    needed_since = max(
        (ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt")
    )
    return MADE.exists() and MADE.stat().st_mtime > max(needed_since, time.time() - A_DAY)


def install() -> None:
    """Makes the environment anew: in an empty one, pip cannot pass off an old release for one that it cannot reach."""
    torch = f"torch=={pins()['torch']}"
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    # torch first: on its own its pinned version may be found as a small CPU build.
    for wanted in ([torch], [torch, *requirements()]):
        if subprocess.run([*PIP, "install", "-qq", "--no-compile", *wanted]).returncode:
            sys.exit("The newest releases cannot be installed; see pip's error above.")


def compare() -> None:
    """Names the releases that are newer than their pins.

    Raises:
        SystemExit: one is older than its pin, as from a mirror when the index is out of reach.
    """
    pinned = pins()
    listed = subprocess.run(
        [*PIP, "list", "--format", "json"], check=True, stdout=subprocess.PIPE
    ).stdout
    found = {canonicalize_name(entry["name"]): entry["version"] for entry in json.loads(listed)}
    direct = sorted(
        {canonicalize_name(Requirement(line).name) for line in requirements()} & found.keys()
    )
    changed = {
        name: f"{name} {found[name]} (pinned: {pinned[name]})"
        for name in direct
        if found[name] != pinned[name]
    }
    older = [text for name, text in changed.items() if Version(found[name]) < Version(pinned[name])]
    if older:
        sys.exit(f"The newest releases are out of reach: pip found {', '.join(older)}.")
    if changed:
        print("Newer than constraints.txt:", ", ".join(changed.values()))


def main() -> None:
    if not is_recent():
        print(f"Installing the newest releases into {FOLDER.relative_to(ROOT)} ...", flush=True)
        install()
        compare()
        MADE.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [PYTHON, "-W", "error", "-c", CHECK]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stdout, ran.stderr, sep="\n")
        sys.exit(f"midlogit or its tests fail on the newest releases ({FOLDER.relative_to(ROOT)}).")


if __name__ == "__main__":
    main()
