"""The user's cache folder, where catalogues and compiled plans are kept for the next start."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from layertap.errors import ConfigError
from layertap.extraction.plan_cache import PlanCache

__all__ = ["open_plan_cache", "user_cache"]

_log = logging.getLogger(__name__)


def open_plan_cache(place: str, max_bytes: int, *, catalogues: bool = True) -> PlanCache | None:
    """Open the folder; create it if it doesn't exist.

    If the user has no cache folder, as in some containers, ``auto`` keeps nothing.

    Args:
        place: ``"auto"`` for the user's cache folder, ``"off"`` for none, or a folder.
        max_bytes: Maximum total size of its files.
        catalogues: Whether catalogues are kept, too.

    Returns:
        The cache; None if nothing is to be kept.

    Raises:
        ConfigError: If the folder that was named can't be used.
    """
    if place == "off":
        return None
    if place != "auto":
        return PlanCache(Path(place).expanduser(), max_bytes, catalogues=catalogues)
    try:
        return PlanCache(user_cache() / "plans", max_bytes, catalogues=catalogues)
    except (ConfigError, RuntimeError) as error:  # RuntimeError: the user has no home.
        _log.warning("compiled plans are not stored: %s", error)
        return None


def user_cache() -> Path:
    """Return layertap's part of the user's cache folder, by the XDG base directory specification.

    Raises:
        RuntimeError: If the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "layertap"
