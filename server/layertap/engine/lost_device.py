"""Notices that a GPU can't be used by this process any more.

An index that is out of range stops a kernel on the device by an assertion. From then on every call
of CUDA in the process fails, whatever model it is for, and only a new process can use the device.
The same holds for illegal memory accesses and hardware faults.

Source: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html, the errors that
leave "the process in an inconsistent state".
"""

from __future__ import annotations

import torch

__all__ = ["loss_of"]


def loss_of(device: torch.device, error: BaseException) -> str:
    """Return why a device is lost; empty if it works, or the error is none of CUDA's.

    Args:
        device: The CUDA device on which a job failed.
        error: The job's error; those that it was raised from are looked at, too.
    """
    cause = _of_cuda(error)
    if cause is None:
        return ""
    try:
        torch.cuda.synchronize(device)
    except torch.AcceleratorError:
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        return (
            f"device {device} can't be used any more, because a pass failed on it ({reason}); "
            f"start the server or the process again"
        )
    return ""


def _of_cuda(error: BaseException | None) -> BaseException | None:
    while error is not None and not isinstance(error, torch.AcceleratorError):
        error = error.__cause__ or error.__context__
    return error
