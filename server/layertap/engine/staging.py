"""Copies between the host and a GPU through page-locked memory, overlapping with passes.

Note [Staging]
    A blocking copy in the middle of a forward pass makes the host wait for every kernel launched so
    far and the device for every kernel launched after, once for each captured layer. So a value is
    cloned on the device, in the pass's own stream, where no later in-place operation can show in
    it; a second stream copies the clone to page-locked memory, without which such a copy blocks;
    and the caller's thread waits once, for the last copy, and writes the reply from there.

    Meanwhile the compute thread launches the next pass, so that the device does not wait for the
    host between two passes. It goes no further than one pass ahead: requests that come later can
    still join the pass after that, and the memory of what was launched stays bounded.

    An input goes the other way. A copy from ordinary memory makes CUDA copy it to page-locked
    memory first, piece by piece, and the compute thread would wait for that. So the caller's thread
    copies the input to page-locked memory, while the compute thread runs other requests, and the
    compute thread only launches the copy to the device.

    PyTorch's own allocator of page-locked memory reuses a block once the copies into it are
    over. It never returns memory: it holds as much as was ever in use at one time.

    A wrong order between streams shows only as occasional wrong values. So this method is compared
    with blocking copies on the device before it is used; if it differs or fails, blocking copies
    are used instead.
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

    ``take`` and ``launched`` belong to the device's compute thread; any thread may call ``upload``.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    def upload(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a copy of a batch in page-locked memory, which the device can read by itself.

        Args:
            batch: A contiguous tensor on the CPU, ``[B, ...]`` of any dtype.
        """
        page_locked = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
        # numpy copies on this thread alone and without the GIL; torch would start a team of OpenMP
        # threads for each thread that calls it (Note [One compute thread]).
        np.copyto(_bytes_of(page_locked), _bytes_of(batch))
        return page_locked

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Return where a value will be on the host once its pass is over; see ``launched``.

        The value may be overwritten or freed as soon as this returns. Strides are kept where the
        value is dense.
        """
        clone = value.detach().resolve_conj().resolve_neg().clone()
        host = torch.empty_strided(
            clone.size(), clone.stride(), dtype=clone.dtype, device="cpu", pin_memory=True
        )
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            host.copy_(clone, non_blocking=True)
        # Or the clone's memory might be given out again before it was read.
        clone.record_stream(self._copies)
        return host

    def launched(self) -> torch.cuda.Event:
        """Return an event that completes once all captured values have been copied to the host.

        To be called after each pass. It returns once the pass before is over, so that no more than
        two are under way.
        """
        before, self._last = self._last, torch.cuda.Event()
        self._last.record(self._copies)
        if before is not None:
            before.synchronize()
        return self._last


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a contiguous tensor's memory; numpy has no bfloat16, so bytes serve every dtype."""
    flat: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def proven_staging(device: torch.device) -> Staging | None:
    """Return a device's staging; None if it has none or its copies are not to be trusted.

    To be called on the device's compute thread.
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

    The device has other work queued before each round, so a copy that does not wait comes too
    early. Each round reuses the blocks of the round before, and the expected values are known
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
