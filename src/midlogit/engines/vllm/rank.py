"""Another rank of a pair with tensor parallelism: makes the calls of rank 0 until that ends. Knows no text.

    python -m midlogit.engines.vllm.rank FILE_DESCRIPTOR RANK PARENT

The descriptor is a socket to rank 0, which starts this (ranks.py).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from midlogit.engines.vllm.ranks import Call, Failed

LOOK_S = 0.5  # between two looks at whether the parent is there


def main(descriptor: int, rank: int, parent: int) -> None:
    """Runs until rank 0 closes the connection."""
    # Rank 0 finishes what runs after Ctrl-C, and needs the others for that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=[parent], daemon=True).start()

    connection = Connection(descriptor)
    try:
        run(connection, rank)
    except EOFError:
        code = 0
    except Exception as error:
        connection.send(Failed(RuntimeError(f"{type(error).__name__}: {error}")))
        code = 1
    # No tidying: rank 0 may have ended already, and groups of processes wait for one another.
    sys.stderr.flush()
    os._exit(code)


def end_with(parent: int) -> None:
    """Ends this process as soon as its parent has ended, whatever it is waiting for."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def run(connection: Connection, rank: int) -> None:
    """Opens this rank's share of both models, and makes the calls of rank 0.

    Raises:
        EOFError: rank 0 has closed the connection.
    """
    import torch

    from midlogit.engines.stepping import freeze_heap
    from midlogit.engines.vllm.lockstep import Lockstep
    from midlogit.engines.vllm.memory import device_memory
    from midlogit.engines.vllm.options import require_vllm

    require_vllm()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    connection.send(device_memory())
    cores, decider, lengths = connection.recv().open(rank)
    lockstep = Lockstep(cores, decider, lengths, lambda last, tokens: None)
    freeze_heap()
    connection.send("open")

    while True:
        for call in connection.recv():
            answer = make(call, lockstep)
            if call.is_answered:
                connection.send(answer)


def make(call: Call, lockstep: object) -> object:
    """Makes a call of rank 0; an error is its answer, or where it waits for none, the end."""
    try:
        return call.call(lockstep, *call.arguments)
    except Exception as error:
        if not call.is_answered:
            raise
        return error


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
