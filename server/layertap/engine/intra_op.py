"""How many cores the operations of one thread compute with."""

from __future__ import annotations

import torch

from layertap.resources import available_cpus

__all__ = ["set_intra_op"]


def set_intra_op(cores: int | None) -> None:
    """Let operations that this thread runs compute with a number of cores.

    For the calling thread, as OpenMP keeps the number for each thread apart: each thread that runs
    PyTorch calls it first.

    Args:
        cores: The number. None keeps PyTorch's own, which is that of the machine's cores or the
            environment's ``OMP_NUM_THREADS``, unless the process may use fewer: PyTorch knows
            nothing of a container's CPU quota, and a team of 64 threads on a quota of one CPU
            spends most of its time throttled.
    """
    if cores is not None:
        torch.set_num_threads(cores)
    elif torch.get_num_threads() > (usable := available_cpus()):
        torch.set_num_threads(usable)
