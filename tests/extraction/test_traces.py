"""Little is left of a trace once its program was made and dropped."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from batches import batch_for
from layertap.extraction import CapturePoint, PointKind, Taps
from layertap.extraction.kinds.torchscript import trace_taps
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.silence import warnings_ignored
from layertap.wire import codec

SIZE, LAYERS, OPERATIONS, TRACES = 4, 20, 40, 4

glibc = pytest.mark.skipif(codec.malloc_usage() is None, reason="needs glibc's malloc")


class Layer(nn.Module):
    """A layer of many operations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(OPERATIONS):
            x = torch.tanh(x)
        return x


def deep() -> nn.Sequential:
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


@pytest.fixture
def model() -> LoadedModel:
    return load_model(ModelSpec(f"{__name__}:deep", item_shape=(SIZE,)), "cpu")


def left_by_each(make: Callable[[], object]) -> float:
    """Return the bytes that stay allocated for each of several results that were dropped."""

    def used() -> int:
        gc.collect()
        usage = codec.malloc_usage()
        assert usage is not None
        return usage[0]

    make()
    before = used()
    for _ in range(TRACES):
        make()
    return (used() - before) / TRACES


@glibc
@torch.inference_mode()
def test_a_dropped_program_leaves_little_behind(model) -> None:
    """A plain trace stays for as long as the process lives; of ours, a fraction does."""
    taps = Taps(model.module)
    points = [CapturePoint(PointKind.MODULE, path) for path, _ in model.module.named_children()]
    x = torch.rand(1, SIZE)

    def plain() -> None:
        with warnings_ignored():
            torch.jit.trace(model.module, x, check_trace=False)

    ours = left_by_each(lambda: trace_taps(model, taps, points, batch_for(model, x)))
    assert ours < left_by_each(plain) / 2
