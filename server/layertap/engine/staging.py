"""Copies between the host and a GPU through page-locked memory, overlapping with passes.

Note [Staging]
    A blocking copy in the middle of a forward pass makes the host wait for all kernels launched so
    far, and the device wait for the kernels launched next, once per captured layer. So a value is
    first cloned on the device, in the stream of the pass, so that later in-place operations don't
    change it. A second stream copies the clone to page-locked memory; without page-locked memory
    the copy would block. The caller's thread waits once, for the last copy, and then writes the
    reply.

    Meanwhile the compute thread launches the next pass, so that the device does not wait for the
    host between two passes. It launches at most one pass ahead. Later requests can then still join
    the pass after that, and the memory of launched passes stays bounded.

    An input is copied in the other direction. If it is in ordinary memory, CUDA first copies it to
    page-locked memory piece by piece, and the compute thread would wait for that. So the caller's
    thread copies the input to page-locked memory, while the compute thread runs other requests.
    The compute thread then only launches the copy to the device.

    PyTorch's own allocator of page-locked memory reuses a block once the copies into it are done.
    It never returns memory to the system: it holds as much as was ever in use at one time.

    A wrong order between streams would show only as occasional wrong values. So before this method
    is used, it is compared with blocking copies on the device; if it differs or fails, blocking
    copies are used instead.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

__all__ = ["Staging", "proven_staging"]

_log = logging.getLogger(__name__)

_BUSY = 2048
_ROUNDS = 3
_COPIES = 8
_ELEMENTS = 1 << 22


class Staging:
    """Copies tensors between one device and the host.

    Only the device's compute thread may call ``take`` and ``launched``; any may call ``upload``.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    def upload(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a copy of a batch in page-locked memory, which the device can read directly.

        Args:
            batch: A contiguous tensor on the CPU, ``[B, ...]`` of any dtype.
        """
        page_locked = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
        # numpy copies on this thread only and without the GIL. torch would start an OpenMP team for
        # each thread that calls it (Note [One compute thread]).
        np.copyto(_bytes_of(page_locked), _bytes_of(batch))
        return page_locked

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Return a host tensor that will hold the value; see ``launched`` for when.

        The value may be overwritten or freed as soon as this returns. The strides are kept if the
        value is dense.
        """
        clone = value.detach().resolve_conj().resolve_neg().clone()
        if clone.device.type == "cpu":  # A layer, or a count, that is not computed on the device.
            return clone
        host = torch.empty_strided(
            clone.size(), clone.stride(), dtype=clone.dtype, device="cpu", pin_memory=True
        )
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            host.copy_(clone, non_blocking=True)
        # Keep the clone's memory from being reused before it was read.
        clone.record_stream(self._copies)
        return host

    def launched(self) -> torch.cuda.Event:
        """Return an event that completes once all captured values have been copied to the host.

        Call this after each pass. It returns once the previous pass has ended, so that at most two
        passes are in progress.
        """
        before, self._last = self._last, torch.cuda.Event()
        self._last.record(self._copies)
        if before is not None:
            before.synchronize()
        return self._last


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a contiguous tensor's memory as bytes, because numpy has no bfloat16."""
    flat: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def proven_staging(device: torch.device) -> Staging | None:
    """Return a device's staging; None if it is not a GPU or its copies gave wrong values.

    Call this on the device's compute thread.
    """
    if device.type != "cuda":
        return None
    try:
        staging = Staging(device)
        if _proves(staging, device):
            return staging
        _log.error(
            "%s: copies that overlap with a pass gave wrong values, so blocking copies are used",
            device,
        )
    except RuntimeError:
        _log.warning(
            "%s: copies can't overlap with a pass, so blocking copies are used",
            device,
            exc_info=True,
        )
    return None


def _proves(staging: Staging, device: torch.device) -> bool:
    """Return whether values that change right after their capture are still copied correctly.

    Before each round the device gets other work, so that a copy that doesn't wait would come too
    early. Each round reuses the memory blocks of the previous round. The expected values are known
    without a copy.
    """
    busy = torch.ones(_BUSY, _BUSY, device=device)
    value = torch.arange(_ELEMENTS, dtype=torch.float32, device=device)
    expected = torch.arange(_ELEMENTS, dtype=torch.float32)
    for _ in range(_ROUNDS):
        for _ in range(_COPIES):
            busy = busy @ busy / _BUSY
        taken = []
        for _ in range(_COPIES):
            taken.append(staging.take(value))
            value.add_(1)
        staging.launched().synchronize()
        for each in taken:
            if not torch.equal(each, expected):
                return False
            expected.add_(1)
    return True
