"""A summary of a pass's values, for comparing other passes with it.

Note [Digests]
    Keeping the values of all layers would take many times the memory of a pass, which frees each
    value after its last use. So later passes are not compared in every element. For a large value
    the digest keeps the shape, the dtype, the largest magnitude, and elements spread evenly over
    it. If a module's input is the tensor that another module returned, both share one digest. That
    is enough here, because a wrong program is wrong in more than a few elements, and because the
    proof of a plan compares its values in full.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from layertap.extraction.containers import pick, plain, unsendable
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.extraction.taps import observe
from layertap.extraction.verify import mismatch
from layertap.models import Batch, LoadedModel
from layertap.selection import Capture

__all__ = ["Digest", "DigestedPass", "digest_pass", "sample_step"]

MAX_SAMPLED = 4096
"""Maximum number of elements that are compared in one item's value."""

MIN_SAMPLED = 512
"""So many are compared even if there are very many values."""

ALL_SAMPLED = 4 << 20
"""Elements that are compared in all values of one item together: 16 MiB of float32.

efficientnet_v2_l has 2,805 inputs and outputs; with 4,096 of each, the samples of all batches took
as much memory as half of its weights.
"""


def sample_step(spec: ValueSpec, values: int = 1) -> int:
    """Return the distance between the elements of a value that are compared; 1 for all of them.

    The distance and the sizes of the value have no common divisor, so that the elements lie in
    all rows and columns.

    Args:
        spec: The value's dtype and shape.
        values: The number of values that are compared.
    """
    elements = math.prod(dim.size for dim in spec.dims)
    most = max(MIN_SAMPLED, min(MAX_SAMPLED, ALL_SAMPLED // values))
    step = max(1, elements // most)
    while math.gcd(step, elements) > 1:
        step += 1
    return step


@dataclass(frozen=True)
class Digest:
    """What is kept of one value for comparison.

    Attributes:
        shape: Its shape.
        elements: Every ``step``-th element, ``[n]``; with step 1 the whole value in its shape.
        step: The distance between these elements in the flattened value.
        largest: The largest finite magnitude in the whole value, ``[1]``, of the value's dtype.
        finite: Whether the whole value is finite.
    """

    shape: tuple[int, ...]
    elements: torch.Tensor
    step: int
    largest: torch.Tensor
    finite: bool

    @classmethod
    def of(cls, value: torch.Tensor, step: int) -> Digest:
        """Return the digest of a value; it copies what it keeps."""
        elements = value.clone() if step == 1 else value.reshape(-1)[::step].clone()
        largest = _largest(value)
        finite = bool(largest.isfinite())
        if not finite:
            largest = value.abs().nan_to_num(0.0, 0.0).amax().reshape(1)
        return cls(tuple(value.shape), elements, step, largest, finite)

    def fault(self, value: torch.Tensor, tolerance: float) -> str:
        """Return how a value differs from the digested one; empty if it is close enough."""
        return self.fault_of_sample(
            tuple(value.shape), value if self.step == 1 else value.reshape(-1)[:: self.step],
            tolerance,
        )  # fmt: skip

    def fault_of_sample(
        self, shape: tuple[int, ...], elements: torch.Tensor, tolerance: float
    ) -> str:
        """Do the same as ``fault``, given only a value's shape and its sampled elements."""
        if shape != self.shape:
            return f"its shape is {list(shape)}, the model's is {list(self.shape)}"
        if self.step == 1 or elements.dtype != self.elements.dtype:
            return mismatch(elements, self.elements, tolerance)
        # The tolerance is a share of the largest magnitude, which may be outside the sample.
        return mismatch(
            torch.cat([elements, self.largest]), torch.cat([self.elements, self.largest]), tolerance
        )


@dataclass
class DigestedPass:
    """The digests of one pass of a model.

    Attributes:
        digests: The digest of each point that exists for this input.
        twins: For each input that is the very tensor that another module returned: that output.
    """

    digests: dict[CapturePoint, Digest] = field(default_factory=dict)
    twins: dict[CapturePoint, CapturePoint] = field(default_factory=dict)


def digest_pass(model: LoadedModel, x: Batch, steps: Mapping[CapturePoint, int]) -> DigestedPass:
    """Run a model on a batch, to its end, and return the digest of each point.

    Args:
        model: The model; its exceptions are passed on.
        x: The batch; it is not changed.
        steps: The points, all of modules, and the distance between the sampled elements of each.
    """
    wanted: dict[tuple[str, Capture, int], list[CapturePoint]] = {}
    for point in steps:
        wanted.setdefault((point.path, point.capture, point.call), []).append(point)
    calls: Counter[tuple[str, Capture]] = Counter()
    digested = DigestedPass()
    outputs: dict[int, CapturePoint] = {}  # The last output at each address.

    def see(path: str, side: Capture, value: Any) -> None:
        call = calls[path, side]
        calls[path, side] += 1
        for point in wanted.get((path, side, call), ()):
            tensor = pick(value, point.member)
            if tensor is not None and not unsendable(tensor):
                keep(point, plain(tensor))

    def keep(point: CapturePoint, value: torch.Tensor) -> None:
        step = steps[point]
        if point.capture is Capture.INPUT:
            twin = outputs.get(value.data_ptr())
            known = digested.digests[twin] if twin else None
            if twin and known and known.step == step and not known.fault(value, 0.0):
                digested.digests[point], digested.twins[point] = known, twin
                return
        digested.digests[point] = Digest.of(value, step)
        if point.capture is Capture.OUTPUT:
            outputs[value.data_ptr()] = point

    with observe(model.module, see):
        model.forward(x.clone())
    return digested


def _largest(value: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of a floating-point value, ``[1]`` of its dtype, else 0.

    It is 0 for dtypes of one byte, too, as torch can't compute with them.
    """
    if not value.is_floating_point() or value.dtype.itemsize == 1 or not value.numel():
        return value.new_zeros(1)
    low, high = value.aminmax()
    return torch.maximum(low.abs(), high.abs()).reshape(1)
