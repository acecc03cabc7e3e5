"""A pair in a process that was forked from its own: an error that says what to do, not a wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys

CHILD = """
import os, sys, warnings
warnings.simplefilter("ignore")
from midlogit import EngineFailure, Pair, SamplingParams
with Pair.local(device="cpu") as pair:
    child = os.fork()
    if not child:
        calls = (
            lambda: pair.generate(["A dog"]), lambda: next(pair.stream("A dog")), lambda: pair.score(["A dog ran"]),
        )
        for call in calls:
            try:
                call()
            except EngineFailure as error:
                print(error, flush=True)
        pair.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print(len(pair.generate(["A dog"], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids))
"""


def test_a_forked_process_is_told_to_open_its_own_pair() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    *refused, tokens = done.stdout.splitlines()
    assert len(refused) == 3 and tokens == "3", done.stderr
    assert all("Open a pair in the child, after the fork." in line for line in refused)
