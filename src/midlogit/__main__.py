"""`python -m midlogit` is the `midlogit` command."""

from __future__ import annotations

import signal
from typing import NoReturn


def run() -> NoReturn:
    """Entry point of the console script; Ctrl-C while its modules are imported ends it without a traceback."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from midlogit.cli import main

    if listens:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main.run()


if __name__ == "__main__":
    run()
