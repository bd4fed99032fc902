"""Copies from a GPU to the host are tested before they are used; a CPU needs none."""

from __future__ import annotations

import pytest
import torch

from devices import needs_cuda
from layertap.engine.staging import Staging, proven_staging


def test_a_cpu_has_none() -> None:
    """On a CPU, values are written into the reply from where they are."""
    assert proven_staging(torch.device("cpu")) is None


@needs_cuda
def test_a_gpu_has_one_that_is_proven() -> None:
    """What the server would only log is an error here."""
    assert proven_staging(torch.device("cuda")) is not None


@needs_cuda
def test_the_proof_finds_copies_that_come_too_early(monkeypatch) -> None:
    """Without waiting for the pass's stream the values are missing, so staging is not used."""
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, stream: None)
    assert proven_staging(torch.device("cuda")) is None


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_strides_dtypes_and_emptiness_survive(dtype) -> None:
    """A value arrives completely, whatever its layout."""
    staging = Staging(torch.device("cuda"))
    value = (torch.rand(4, 6, 5, 3, device="cuda") * 2).to(dtype)
    values = [value, value.permute(0, 3, 1, 2), value[:, ::2], value[:0], value[0, 0, 0, 0]]
    taken = [staging.take(each) for each in values]
    staging.launched().synchronize()
    for each, arrived in zip(values, taken, strict=True):
        assert arrived.is_pinned() or not arrived.numel()
        assert torch.equal(arrived, each.cpu())
