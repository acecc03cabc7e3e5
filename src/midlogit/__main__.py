"""`python -m midlogit` is the `midlogit` command."""

from midlogit.cli.main import run

run()
