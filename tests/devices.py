"""Tests that need a GPU: skipped without one, unless the environment requires them."""

from __future__ import annotations

import os

import pytest
import torch

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() and not os.environ.get("LAYERTAP_REQUIRE_CUDA"),
    reason="needs CUDA; LAYERTAP_REQUIRE_CUDA=1 makes that an error",
)
"""For a test that runs on CUDA. With LAYERTAP_REQUIRE_CUDA=1 it runs, and fails, without."""
