"""A small launch of every kernel, which test_gpu.py has compute-sanitizer watch.

Rows begin where a thread can read several ids at once, as in a real vocabulary, and where it cannot.
"""

from __future__ import annotations

import numpy as np
import torch

from midlogit.decide.kernels.launch import KernelLauncher
from tests.kernels.cases import listing, make_batch, mixed_settings

if __name__ == "__main__":
    bfloat16, float32 = torch.bfloat16, torch.float32
    for vocabulary, dtype in ((4992, bfloat16), (4999, bfloat16), (9008, float32), (9001, float32)):
        base_NV, teacher_NV = (x.to("cuda", dtype) for x in make_batch(8, vocabulary, 1))
        launcher = KernelLauncher(vocabulary, torch.device("cuda"))
        settings = listing(mixed_settings(8, vocabulary, np.random.default_rng(1)))
        prepared, drafts_RC = launcher.prepare(settings), launcher.allocate_drafts(8)
        for k in (0, 4):
            launcher.draft(base_NV, prepared, drafts_RC, slice(k, k + 4))
        decided = launcher.launch(base_NV, teacher_NV, prepared, drafts_RC)
        print(decided.drafted_ids(), decided.token_ids())
