"""Compiles the kernels before the first rows come; knows their arguments from launch.py, no logits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import EqualKL
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.base import RowSettings
from midlogit.decide.kernels.launch import KernelLauncher


class KernelCompiler(KernelLauncher):
    """Compiles what a launcher would run."""

    def _run(self, kernel: Any, programs: int, **arguments: Any) -> None:
        if programs:
            with torch.cuda.device_of(arguments["base"]):  # type: ignore[no-untyped-call]
                kernel.warmup(grid=(programs,), **arguments)


def compile_kernels(vocabulary: int, base_1V: torch.Tensor, teacher_1V: torch.Tensor) -> None:
    """Compiles all kernels but that of `top_logprobs` for rows like these, side by side.

    Triton keeps them on disk, so this takes long only the first time.
    """
    compiler = KernelCompiler(vocabulary, base_1V.device)
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
        for top_p in (None, 0.5):
            compiler.launch(base_1V, teacher_1V, compiler.prepare([_any_settings(top_p)]))


def _any_settings(top_p: float | None) -> RowSettings:
    return RowSettings(
        rule=EqualKL(),
        outcomes=Outcomes(),
        temperature=1.0,
        top_p=top_p,
        alpha_tol=1e-6,
        forced=False,
        may_end=True,
        uniforms=TokenUniforms(0.5, 0.5, 0.5),
    )
