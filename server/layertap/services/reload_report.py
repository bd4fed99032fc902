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
        serving: Whether the model is served now, in this version or an earlier one.
    """

    name: str
    action: ReloadAction
    reason: str = ""
    serving: bool = True


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """The result of a reload.

    Attributes:
        models: The configured models in their order, then the models that were unloaded.
        not_applied: Changed settings that take effect only after a restart.
    """

    models: tuple[ModelReload, ...]
    not_applied: tuple[str, ...] = ()
