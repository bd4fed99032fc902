"""Sets how many cores the operations of one thread use."""

from __future__ import annotations

import torch

from layertap.resources import available_cpus

__all__ = ["intra_op_cores", "set_intra_op", "start_team"]

# More elements than PyTorch computes with one thread (at::internal::GRAIN_SIZE is 32,768).
_PARALLEL_ELEMENTS = 1 << 17


def set_intra_op(cores: int | None) -> None:
    """Set the number of cores that operations of the calling thread use.

    OpenMP keeps this number for each thread, so each thread that runs PyTorch calls this first.

    Args:
        cores: The number of cores. If None, PyTorch's own number is kept, which is the number of
            the machine's cores or ``OMP_NUM_THREADS``, unless the process may use fewer. PyTorch
            ignores a container's CPU quota, and a team of 64 threads with a quota of one CPU is
            throttled most of the time.
    """
    if cores is not None or torch.get_num_threads() > available_cpus():
        torch.set_num_threads(intra_op_cores(cores))


def intra_op_cores(cores: int | None) -> int:
    """Return the number of cores that a thread uses after ``set_intra_op(cores)``."""
    return min(torch.get_num_threads(), available_cpus()) if cores is None else cores


def start_team() -> None:
    """Start the OpenMP team of the calling thread before it needs one.

    OpenMP's library ends the process if it can't start a thread. So the team should exist before
    the server is ready, as threads may become scarce later.
    """
    torch.ones(_PARALLEL_ELEMENTS).add_(1)
