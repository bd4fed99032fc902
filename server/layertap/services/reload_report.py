"""The result of a reload: what happened to each model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ModelReload", "ReloadAction", "ReloadReport"]


class ReloadAction(StrEnum):
    """What a reload did with a model, as in ``admin_service.proto``."""

    UNCHANGED = "unchanged"
    LOADED = "loaded"
    REPLACED = "replaced"
    UNLOADED = "unloaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelReload:
    """What happened to one model.

    Attributes:
        name: The model's name.
        action: What was done.
        reason: Why it failed; empty if it didn't.
        serving: Whether it is served now, by this version or the one before it.
    """

    name: str
    action: ReloadAction
    reason: str = ""
    serving: bool = True


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a reload did.

    Attributes:
        models: Those of the configuration in its order, then those that were unloaded.
        not_applied: Settings that changed and take effect after a restart.
    """

    models: tuple[ModelReload, ...]
    not_applied: tuple[str, ...] = ()
