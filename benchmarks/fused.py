"""The decision by kernels against arrays and against reading both rows once, on CUDA; knows logits, no engine.

    python -m benchmarks.fused                 writes benchmarks/results/fused.json

Medians in milliseconds, with the rows of a batch drawn from several sets that together exceed the L2 cache. `flat` rows
are what models of random weights give, `peaked` rows resemble those of trained ones. `read` is the time to read the
same bytes once: both models' rows in bfloat16. `solve` includes the drafts, whose time alone is `draft`; `acceptance`
is the share of them that was accepted. `solve_top` is `solve` with `top_logprobs` of 1, 20 and 256 in every row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import EqualKL
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.arrays import decide
from midlogit.decide.base import RowSettings
from midlogit.decide.kernels.launch import KernelLauncher

RESULTS = Path(__file__).parent / "results" / "fused.json"
VOCABULARY = 151936
OUTCOMES = Outcomes(masked_ids=tuple(range(151646, VOCABULARY)), stop_ids=(151643, 151645))
AT_LEAST = 300_000_000  # bytes of all sets together
TOP_LOGPROBS = (1, 20, 256)
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def make_pairs(batch: int, kind: str = "peaked", dtype: torch.dtype = torch.bfloat16) -> Pairs:
    """Sets of (base, teacher) logits [batch, VOCABULARY] that no cache holds."""
    size = 2 * batch * VOCABULARY * dtype.itemsize
    generator = torch.Generator("cuda").manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    pairs = []
    for _ in range(max(3, -(-AT_LEAST // size))):
        teacher = noise(batch, VOCABULARY)
        base = noise(batch, VOCABULARY)
        if kind == "peaked":
            # A bulk, some hundreds of plausible ids, and one that stands out more in some rows than in others.
            height = torch.rand((batch, 1), generator=generator, device="cuda")
            heads = torch.randint(VOCABULARY, (batch, 300), generator=generator, device="cuda")
            rank = torch.arange(1, 301, device="cuda").log()[None, :]
            teacher = 2 * teacher
            teacher.scatter_(
                1, heads, 16 + 4 * height - (1 + height) * 1.5 * rank + noise(batch, 300)
            )
            base = 0.9 * teacher + 0.7 * base
        pairs.append((base.to(dtype), teacher.to(dtype)))
    return pairs


def settings(batch: int, constrained: bool, top_logprobs: int = 0) -> list[RowSettings]:
    """Settings of `batch` ordinary rows."""
    return [
        RowSettings(
            rule=EqualKL(),
            outcomes=OUTCOMES,
            temperature=1.0,
            top_p=0.95 if constrained else None,
            alpha_tol=1e-6,
            forced=False,
            may_end=True,
            uniforms=TokenUniforms(*uniforms),
            top_logprobs=top_logprobs,
        )
        for uniforms in np.random.default_rng(1).random((batch, 3)).tolist()
    ]


def median_ms(
    work: Callable[[torch.Tensor, torch.Tensor], object], pairs: Pairs, rounds: int = 30
) -> float:
    """Median time on the device of `work`; a pause keeps the device busy while it is enqueued."""
    times = []
    for i in range(rounds + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        start.record()
        work(*pairs[i % len(pairs)])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def time_fused(
    batch: int,
    constrained: bool,
    kind: str = "peaked",
    dtype: torch.dtype = torch.bfloat16,
    top_logprobs: int = 0,
) -> float:
    """Milliseconds of a decision by kernels with its transfer of results."""
    launcher = KernelLauncher(VOCABULARY, torch.device("cuda"))
    prepared = launcher.prepare(settings(batch, constrained, top_logprobs))
    return median_ms(
        lambda base, teacher: launcher.launch(base, teacher, prepared),
        make_pairs(batch, kind, dtype),
    )


def time_draft(batch: int, kind: str = "peaked", dtype: torch.dtype = torch.bfloat16) -> float:
    """Milliseconds of the drafts alone, which a decision includes."""
    launcher = KernelLauncher(VOCABULARY, torch.device("cuda"))
    prepared, drafts_RC = launcher.prepare(settings(batch, False)), launcher.allocate_drafts(batch)
    return median_ms(
        lambda base, _: launcher.draft(base, prepared, drafts_RC), make_pairs(batch, kind, dtype)
    )


def acceptance(batch: int, constrained: bool, kind: str) -> float:
    """The share of the drafts that a decision by kernels accepts."""
    launcher = KernelLauncher(VOCABULARY, torch.device("cuda"))
    decided = launcher.launch(
        *make_pairs(batch, kind)[0], launcher.prepare(settings(batch, constrained))
    )
    return statistics.mean(
        a == b for a, b in zip(decided.token_ids(), decided.drafted_ids(), strict=True)
    )


def time_torch(
    batch: int, constrained: bool, kind: str = "peaked", dtype: torch.dtype = torch.bfloat16
) -> float:
    """Milliseconds of `decide`, its waits included."""
    asked = settings(batch, constrained)
    return median_ms(
        lambda base, teacher: decide(base, teacher, asked), make_pairs(batch, kind, dtype), 3
    )


@triton.jit
def _read(x, y, sums, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    of_x = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    of_y = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(of_x + of_y))


def time_read(batch: int, dtype: torch.dtype) -> float:
    """Milliseconds to read both models' rows of a batch once; the kernels read rows of the models' own dtype."""
    size, block = batch * VOCABULARY, 8192
    programs = -(-size // block)
    sums = torch.empty(programs, device="cuda")
    pairs = make_pairs(batch, "flat", dtype)
    return median_ms(
        lambda base, teacher: _read[(programs,)](base, teacher, sums, size, BLOCK=block), pairs
    )


def measure(batch: int, kind: str) -> dict[str, float | int | str]:
    """Everything of one batch size and kind of rows, all in bfloat16."""
    return {
        "batch": batch,
        "rows": kind,
        "read_ms": time_read(batch, torch.bfloat16),
        "draft_ms": time_draft(batch, kind),
        "solve_ms": time_fused(batch, False, kind),
        "solve_constrained_ms": time_fused(batch, True, kind),
        **{
            f"solve_top_{k}_ms": time_fused(batch, False, kind, top_logprobs=k)
            for k in TOP_LOGPROBS
        },
        "torch_solve_ms": time_torch(batch, False, kind),
        "torch_solve_constrained_ms": time_torch(batch, True, kind),
        "acceptance": acceptance(batch, False, kind),
        "acceptance_constrained": acceptance(batch, True, kind),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--output", type=Path, default=RESULTS)
    output = options.parse_args().output
    device, versions = (
        torch.cuda.get_device_name(),
        {"torch": torch.__version__, "triton": triton.__version__},
    )
    print(device, versions)
    print(
        f"{'batch':>5} {'rows':>6} {'read':>7} {'draft':>7} {'solve':>7} {'top_p':>7} "
        f"{'top 1':>7} {'top 20':>7} {'top 256':>7} {'torch':>8} {'t top_p':>8} "
        f"{'accept':>6} {'a top_p':>7} {'/read':>6} {'t /read':>7}"
    )
    rows = []
    for batch in (1, 8, 64, 256):
        for kind in ("peaked", "flat"):
            row = measure(batch, kind)
            rows.append(row)
            _, _, read, draft, free, top_p, *tops, plain, plain_top_p, accept, accept_top_p = (
                row.values()
            )
            print(
                f"{batch:5} {kind:>6} {read:7.3f} {draft:7.3f} {free:7.3f} {top_p:7.3f} "
                f"{' '.join(f'{top:7.3f}' for top in tops)} {plain:8.2f} {plain_top_p:8.2f} "
                f"{accept:6.2f} {accept_top_p:7.2f} {free / read:6.1f} {top_p / read:7.1f}"
            )
    date = datetime.date.today().isoformat()
    output.write_text(
        json.dumps({"device": device, "versions": versions, "date": date, "rows": rows}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()
