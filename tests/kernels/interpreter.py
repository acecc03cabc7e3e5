"""Triton's interpreter, several times as fast; knows its internals and no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """Has the interpreter patch `triton.language` once per launch and module.

    It does so for each call of a function in a kernel, and looks through all members of the language each time.
    """
    patch: Callable[..., Any] = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(function)

    def launch_patched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # the launch before has restored the language
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched
