"""Virtual environments of trainers below .cache, each made once; their pins exclude each other and ours."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "exports"
TORCH = ["torch==2.13.0"]  # first: on its own it may be found as a small CPU build
# axolotl asks for CUDA, cloud storage and user interfaces; its loader and distillation loss import these alone.
AXOLOTL = [
    "accelerate==1.13.0",
    "addict",
    "colorama",
    "datasets==4.8.4",
    "fire",
    "numba",
    "peft==0.20.0",
    "posthog==6.7.11",
    "pydantic",
    "python-dotenv",
    "transformers==5.16.1",
    "trl==1.9.0",
]
# verl-core leaves out only what runs models on a GPU; an installed midlogit is a plugin that verl loads.
VERL = ["verl[verl-core]==0.9.1", "scipy", "--editable", f"{ROOT}[http]"]
# AReaL asks for CUDA and libraries of agents; its engine for vLLM servers imports these alone. With four more they run
# slime's rollout loop.
AREAL = [
    "aiofiles",
    "aiohttp",
    "colorlog",
    "einops",
    "flask",
    "httpx",
    "hydra-core==1.4.0.dev1",
    "lark",
    "numba",
    "omegaconf==2.4.0.dev2",
    "openai",
    "orjson",
    "packaging",
    "pillow",
    "psutil",
    "pybase64",
    "pydantic",
    "ray",
    "requests",
    "setproctitle",
    "tenacity",
    "torchdata",
    "transformers==5.3.0",
    "uvloop",
]
SLIME = ["array-api-compat", "pyarrow", "pylatexenc", "sglang-router==0.3.2"]
CLIENTS = {
    "prime-rl": [["verifiers==0.4.0", "renderers[transformers]==0.1.12"]],
    "areal": [TORCH, ["--no-deps", "areal==1.0.4"], [*AREAL, *SLIME]],
}
STEPS = {
    "verl": [TORCH, VERL],
    "axolotl": [TORCH, ["--no-deps", "axolotl==0.19.0", "liger-kernel==0.8.1"], AXOLOTL],
}
ALL = STEPS | CLIENTS


def install(library: str) -> Path:
    """The Python of a library's environment, made when it is not there or was made in other steps."""
    folder = FOLDER / library
    python, done = folder / "bin" / "python", folder / ".ready"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist runs several of us
        if done.exists() and done.read_text() == str(ALL[library]):
            return python
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-compile"]
        for packages in ALL[library]:
            subprocess.run([*pip, *packages], check=True)
        done.write_text(str(ALL[library]))
    return python


if __name__ == "__main__":
    print(install(sys.argv[1]))
