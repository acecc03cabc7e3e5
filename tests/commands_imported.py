"""Imports what commands import when they open the bundled pair; starts no thread and computes nothing."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

import midlogit.cli.main
import midlogit.engines.local.opening  # noqa: F401
