"""The default limits on the server's memory.

Some settings declare a ``memory_share``: their default is at most that fraction of the memory that
the process may use. Together, replies, kept memory, shared memory and the compiled plans of one
model take at most five eighths; the rest is left to the process and the models. A single reply may
take most of ``pending_mib``, which counts its request as well.
"""

from __future__ import annotations

from layertap.resources import memory_limit
from layertap.settings import Limits, ServerOptions, definitions
from layertap.settings.value_kinds import MIB

__all__ = ["default_mib", "defaults_here", "excess"]

_SHARES = {
    each.key: each
    for owner in (ServerOptions, Limits)
    for each in definitions(owner)
    if each.setting.memory_share
}


def default_mib(key: str, memory: int | None = None) -> int:
    """Return the default of a setting in MiB, at least 1.

    Args:
        key: The setting's key in the configuration, such as ``pending_mib``.
        memory: The bytes of memory that the process may use; read from the system if not given.
    """
    available = memory_limit() if memory is None else memory
    setting = _SHARES[key]
    default: int = setting.default
    return max(1, min(default, available // setting.setting.memory_share) // MIB)


def defaults_here(owner: type) -> dict[str, int]:
    """Return the defaults, by key, of those settings of a dataclass that depend on the memory."""
    memory = memory_limit()
    return {
        each.key: default_mib(each.key, memory)
        for each in definitions(owner)
        if each.key in _SHARES
    }


def excess(promised_bytes: int, memory: int | None = None) -> str:
    """Return a warning if the limits allow more memory than there is; empty if they don't.

    Args:
        promised_bytes: The bytes that replies, kept memory and shared memory may take together.
        memory: The bytes of memory that the process may use; read from the system if not given.
    """
    available = memory_limit() if memory is None else memory
    if promised_bytes // MIB < available // MIB:
        return ""
    return (
        f"pending_mib, keep_memory_mib and shared_memory_mib allow {promised_bytes // MIB} MiB "
        f"in total, but this process and its models may use only {available // MIB} MiB; under "
        f"load the system may kill it. Lower these settings, or omit them to get limits that fit"
    )
