"""Shared by the scripts that tests/services/infer/test_tritonclient.py runs in .venv-triton."""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.grpc as triton

ADDRESS = sys.argv[1]
MODEL = "residual"
ITEM = (3, 16, 16)
# Answers are compared bit for bit, so they come from one extractor: others round differently.
HOOK = {"extractor": "hook"}


def batch(size: int = 2, seed: int = 5) -> np.ndarray:
    """Return a random batch."""
    return np.random.default_rng(seed).random((size, *ITEM), dtype=np.float32)


def tensor(x: np.ndarray, datatype: str = "FP32") -> triton.InferInput:
    """Return an input with a numpy array in it."""
    given = triton.InferInput("input", list(x.shape), datatype)
    given.set_data_from_numpy(x)
    return given


def refused(call: object, *texts: str) -> None:
    """Check that a call fails with a text that contains these."""
    said = ""
    try:
        call()
    except triton.InferenceServerException as error:
        said = str(error)
    missing = [text for text in texts if text not in said]
    assert not missing, f"{missing} not in {said!r}"
