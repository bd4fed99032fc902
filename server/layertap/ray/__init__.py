"""Layers of Ray data sets, and servers in Ray Serve. Needs ``layertap[ray]``.

What is for data sets is imported when it is used, because Ray Serve's proxies import this module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layertap.ray.data import extract
    from layertap.ray.parquet import Written, extract_to_parquet

__all__ = ["Written", "extract", "extract_to_parquet"]

_HOME_OF = {
    "Written": "layertap.ray.parquet",
    "extract": "layertap.ray.data",
    "extract_to_parquet": "layertap.ray.parquet",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used.

    Raises:
        AttributeError: If the name is not public.
    """
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
