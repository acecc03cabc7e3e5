"""A pair over HTTP as its users install it beside a trainer: no torch, and no transformers or an older one."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from midlogit import Pair
from tests.http import light_client
from tests.http.conftest import Urls

ROOT = Path(__file__).parents[2]
OLDER = "transformers==5.3.0"  # the oldest that a trainer pins (AReaL 1.0.4)


def install(name: str, *packages: str) -> Path:
    """The Python of an environment below .cache with midlogit[http] and packages, made once."""
    folder = ROOT / ".cache" / name
    python, done = folder / "bin" / "python", folder / ".ready"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
            command = [*pip, "--no-compile", "--editable", f"{ROOT}[batch,http]", *packages]
            subprocess.run(command, check=True)
            done.touch()
    return python


@pytest.mark.parametrize(("name", "packages"), [("light", ()), ("light-older", (OLDER,))])
def test_everything_above_the_servers_without_torch(
    urls: Urls, tmp_path: Path, name: str, packages: tuple[str, ...]
) -> None:
    python = install(name, *packages)
    command = [python, light_client.__file__, urls.base, urls.teacher, tmp_path]
    path = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imported"] == [] and found["transformers"] == bool(packages)

    with Pair.http(urls.base, urls.teacher) as pair:
        expected = pair.generate(light_client.PROMPTS, light_client.PARAMS, progress=False)
    assert found["token_ids"] == [c.token_ids for c in expected]
    assert found["texts"] == [c.text for c in expected]
    assert found["command"].rstrip("\n") == expected[0].text
    assert len(found["batch"]) == 2 and all(found["batch"])
