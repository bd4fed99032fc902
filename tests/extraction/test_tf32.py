"""TF32 is one setting of the process, and can be read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from layertap.extraction.tf32 import allow_tf32, tf32_allowed
from layertap.extraction.verify import COMPILED_TOLERANCE, compiled_tolerance


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    backends = torch.backends
    former = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    yield
    backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = former


@pytest.mark.parametrize("allowed", [True, False])
def test_what_was_set_is_reported(allowed) -> None:
    """Both of PyTorch's APIs, the current and the former one, report what was set."""
    allow_tf32(allowed)
    assert tf32_allowed() is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


def test_pytorch_allows_it_by_default(tf32_at_first: bool) -> None:
    """This is the reason for the setting: by default convolutions may use TF32."""
    assert tf32_at_first


@pytest.mark.parametrize("dtype", list(COMPILED_TOLERANCE))
def test_a_cpu_has_no_tf32(dtype) -> None:
    """On a CPU the tolerance is that of the dtype, whatever the setting."""
    allow_tf32(True)
    assert compiled_tolerance(torch.zeros(1, dtype=dtype)) == COMPILED_TOLERANCE[dtype]


def test_other_types_must_be_equal() -> None:
    """Integers have no tolerance."""
    assert compiled_tolerance(torch.zeros(1, dtype=torch.int64)) == 0.0
