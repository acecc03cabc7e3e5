"""A typer command that takes prompts as arguments; knows how they are mistaken for options."""

from __future__ import annotations

import re
import shlex
from typing import Any

from typer.core import TyperCommand

OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?", re.DOTALL)


class PromptCommand(TyperCommand):
    """A command with prompts as arguments; its errors say how to give one that begins with a dash."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return list(super().parse_args(ctx, args))
        except Exception as error:
            refused: Any = error
            option = getattr(refused, "option_name", None)
            if option and (
                prompt := next(
                    (a for a in given if a.startswith(option) and not OPTION.fullmatch(a)), None
                )
            ):
                refused.message = (
                    f"{refused.message}. A prompt that begins with a dash comes after --: "
                    f"{ctx.command_path} -- {shlex.quote(prompt)}"
                )
            raise
