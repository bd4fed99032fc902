"""How much memory the server may use where its configuration doesn't say."""

from __future__ import annotations

from layertap.engine import Limits
from layertap.malloc import DEFAULT_KEPT_MIB
from layertap.resources import memory_limit
from layertap.shm.shared_memory import DEFAULT_SHARED_MIB

__all__ = ["MIB", "default_mib", "excess"]

MIB = 1 << 20

_MOST = {
    "request_mib": Limits().request_bytes // MIB,
    "reply_mib": Limits().reply_bytes // MIB,
    "pending_mib": Limits().pending_bytes // MIB,
    "plan_mib": Limits().plan_bytes // MIB,
    "keep_memory_mib": DEFAULT_KEPT_MIB,
    "shared_memory_mib": DEFAULT_SHARED_MIB,
}
"""The defaults on a machine with memory enough for all of them."""

_PARTS = {
    "request_mib": 16,
    "reply_mib": 4,
    "pending_mib": 4,
    "plan_mib": 8,
    "keep_memory_mib": 8,
    "shared_memory_mib": 8,
}
"""Each default takes at most one such part of the memory.

Replies, kept memory, shared memory and one model's compiled plans together take five eighths; the
rest is left to the process and the models. A single reply may take most of ``pending_mib``,
which counts its request as well.
"""


def default_mib(setting: str, memory: int | None = None) -> int:
    """Return the default of a setting in MiB, at least 1.

    Args:
        setting: Its key in the configuration, such as ``pending_mib``.
        memory: The bytes of memory that the process may use; asked of the system if not given.
    """
    available = memory_limit() if memory is None else memory
    return max(1, min(_MOST[setting], available // _PARTS[setting] // MIB))


def excess(promised_mib: int, memory: int | None = None) -> str:
    """Return a warning where the limits promise more memory than there is; else an empty text.

    Args:
        promised_mib: What replies, kept and shared memory may take together, in MiB.
        memory: The bytes of memory that the process may use; asked of the system if not given.
    """
    available = (memory_limit() if memory is None else memory) // MIB
    if promised_mib < available:
        return ""
    return (
        f"pending_mib, keep_memory_mib and shared_memory_mib allow {promised_mib} MiB together, "
        f"but this process may use {available} MiB, models included; under load the system may "
        f"kill it. Lower them, or leave them out to get limits that fit"
    )
