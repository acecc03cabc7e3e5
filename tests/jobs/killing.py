"""Runs `midlogit batch run` again and again in forked processes and kills them; a process of its own.

python -m tests.jobs.killing INPUT RUN KILLS WORKERS SEED [OPTION...]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def main(source: str, run: str, kills: str, workers: str, seed: str, *options: str) -> None:
    import_everything()
    chance = random.Random(int(seed))
    line = ["batch", "run", source, "--out", run, *options]
    ended: Counter[str] = Counter()
    for kill in range(int(kills)):
        if kill % 5 == 4:
            damage(Path(run), chance)
        pids = [start([*line, *role(n, int(workers))]) for n in range(int(workers))]
        before = finished(Path(run))
        # Half of the kills hit the start; the others come when something was finished since.
        while kill % 2 and finished(Path(run)) <= before and all(map(runs, pids)):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.7))
        number = chance.choice([signal.SIGKILL] * 4 + [signal.SIGTERM])
        for pid in pids:
            if runs(pid):
                os.kill(pid, number)
        ended.update(f"{number.name} {end(pid)}" for pid in pids)

    last = [end(start([*line, *role(n, int(workers))])) for n in range(int(workers))]
    print(*(f"{how}: {times}" for how, times in sorted(ended.items())), last, sep="\n")
    sys.exit(max(last))


def import_everything() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyarrow.parquet
        import torch  # noqa: F401
        import transformers

        from midlogit.cli import jobs, main  # noqa: F401
        from midlogit.engines.local import engine  # noqa: F401
        from midlogit.jobs import Job  # noqa: F401
        from midlogit.models.checkpoint import bundled

        config = transformers.AutoConfig.from_pretrained(bundled("base"))
        assert transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert pyarrow.parquet


def role(number: int, workers: int) -> list[str]:
    return [] if workers == 1 else ["--worker", f"{number}/{workers}"]


def start(arguments: Sequence[str]) -> int:
    """Forks a process that runs the command as the console script does."""
    pid = os.fork()
    if pid:
        return pid
    from midlogit.__main__ import run

    sys.argv = ["midlogit", *arguments]
    try:
        run()
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))
    os._exit(99)


def runs(pid: int) -> bool:
    """Whether a process still runs; one that ended is left for `end`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(run: Path) -> int:
    """Bytes of finished work: grows with every completion and every part."""
    sizes = 0
    for path in [*run.glob("journal/*"), *run.glob("data/*")]:
        with suppress(FileNotFoundError):
            sizes += path.stat().st_size * (1 if path.parent.name == "journal" else 1000)
    return sizes


def damage(run: Path, chance: random.Random) -> None:
    """A torn line at the end of a journal, and a part that was being written."""
    journals = sorted(run.glob("journal/*"))
    if journals:
        with chance.choice(journals).open("ab") as journal:
            journal.write(b'{"row":3,"sample":1,"text":"torn')
    if (run / "tmp").exists():
        (run / "tmp" / "part-00002.parquet.half").write_bytes(b"PAR1 half a part")


if __name__ == "__main__":
    main(*sys.argv[1:])
