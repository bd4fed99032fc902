"""The folder in which a server stores compiled plans."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from layertap.errors import ConfigError
from layertap.extraction.plan_cache import PlanCache
from layertap.settings import ServerOptions

__all__ = ["open_plan_cache"]

_log = logging.getLogger(__name__)


def open_plan_cache(options: ServerOptions) -> PlanCache | None:
    """Open the folder for compiled plans; create it if it doesn't exist.

    If the user has no cache folder, as in some containers, ``auto`` stores no plans.

    Returns:
        The cache; None if no plans are to be stored.

    Raises:
        ConfigError: If the configuration names a folder that can't be used.
    """
    if options.plan_cache == "off":
        return None
    if options.plan_cache != "auto":
        return _opened(Path(options.plan_cache).expanduser(), options)
    try:
        return _opened(_user_cache(), options)
    except (ConfigError, RuntimeError) as error:  # RuntimeError: the user has no home.
        _log.warning("compiled plans are not stored: %s", error)
        return None


def _opened(folder: Path, options: ServerOptions) -> PlanCache:
    return PlanCache(folder, options.plan_cache_bytes, catalogues=options.keep_catalogues)


def _user_cache() -> Path:
    """Return the user's cache folder, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "layertap" / "plans"
