"""The kernels on the CPU through Triton's interpreter, in another process.

Each test of interpreted.py and interpreted_top.py is a case.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from midlogit.decide import decider_for
from midlogit.decide.array_decider import ArrayDecider

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parent
INTERPRETED = FOLDER / "interpreted.py", FOLDER / "interpreted_top.py"
NAMES = [
    name
    for file in INTERPRETED
    for name in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By name of the test that ran what it failed with, nothing if it passed."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junit-xml={report}",
            *INTERPRETED,
        ],
        cwd=FOLDER.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert report.exists(), run.stdout[-4000:] + run.stderr[-4000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found[case.attrib["name"].removeprefix("test_")] = "\n".join(
            part.text or part.tag for part in case
        )
    assert found, run.stdout[-4000:]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_kernels_in_the_interpreter(name: str, failures: dict[str, str]) -> None:
    if failures[name]:
        pytest.fail(failures[name], pytrace=False)


def test_the_cpu_is_left_to_arrays() -> None:
    assert isinstance(decider_for(300, torch.device("cpu")), ArrayDecider)
