"""How much memory the server may use where its configuration doesn't say.

Some settings declare their ``memory_share``: their default takes at most that part of the memory
that the process may use. Replies, kept memory, shared memory and one model's compiled plans
together take five eighths at most; the rest is left to the process and the models. A single reply
may take most of ``pending_mib``, which counts its request as well.
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
        key: Its key in the configuration, such as ``pending_mib``.
        memory: The bytes of memory that the process may use; asked of the system if not given.
    """
    available = memory_limit() if memory is None else memory
    setting = _SHARES[key]
    default: int = setting.default
    return max(1, min(default, available // setting.setting.memory_share) // MIB)


def defaults_here(owner: type) -> dict[str, int]:
    """Return the defaults, by key, of a dataclass's settings that depend on the memory."""
    memory = memory_limit()
    return {
        each.key: default_mib(each.key, memory)
        for each in definitions(owner)
        if each.key in _SHARES
    }


def excess(promised_bytes: int, memory: int | None = None) -> str:
    """Return a warning where the limits promise more memory than there is; else an empty text.

    Args:
        promised_bytes: What replies, kept and shared memory may take together.
        memory: The bytes of memory that the process may use; asked of the system if not given.
    """
    available = memory_limit() if memory is None else memory
    if promised_bytes // MIB < available // MIB:
        return ""
    return (
        f"pending_mib, keep_memory_mib and shared_memory_mib allow {promised_bytes // MIB} MiB "
        f"in total, but this process and its models may use only {available // MIB} MiB; under "
        f"load the system may kill it. Lower these settings, or omit them to get limits that fit"
    )
