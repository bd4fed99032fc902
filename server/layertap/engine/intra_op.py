"""Sets how many cores the operations of one thread use."""

from __future__ import annotations

import torch

from layertap.resources import available_cpus

__all__ = ["intra_op_cores", "set_intra_op", "start_team"]

# More elements than PyTorch leaves to one thread (at::internal::GRAIN_SIZE is 32,768).
_PARALLEL_ELEMENTS = 1 << 17


def set_intra_op(cores: int | None) -> None:
    """Set the number of cores that operations of the calling thread use.

    OpenMP keeps this number for each thread, so each thread that runs PyTorch calls this first.

    Args:
        cores: The number. None keeps PyTorch's own, which is that of the machine's cores or the
            environment's ``OMP_NUM_THREADS``, unless the process may use fewer: PyTorch knows
            nothing of a container's CPU quota, and a team of 64 threads on a quota of one CPU
            spends most of its time throttled.
    """
    if cores is not None or torch.get_num_threads() > available_cpus():
        torch.set_num_threads(intra_op_cores(cores))


def intra_op_cores(cores: int | None) -> int:
    """Return how many cores a thread computes with after ``set_intra_op(cores)``."""
    return min(torch.get_num_threads(), available_cpus()) if cores is None else cores


def start_team() -> None:
    """Start the OpenMP team of the calling thread before it needs one.

    OpenMP's library ends the process if it can't start a thread. So the team should exist before a
    server is ready, when threads may become scarce.
    """
    torch.ones(_PARALLEL_ELEMENTS).add_(1)
