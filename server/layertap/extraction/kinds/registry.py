"""Every extractor kind, in the order in which AUTO prefers them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from layertap.extraction.kinds.base import CompiledKind, DirectKind, ReferenceKind
from layertap.selection import Extractor

__all__ = ["KINDS", "REFERENCE", "AnyKind", "kind_of"]

AnyKind = DirectKind | CompiledKind[Any]


def _load(extractor: Extractor) -> AnyKind:
    """Return ``KIND`` from the module that has the extractor's name."""
    kind = import_module(f"{__package__}.{extractor.value}").KIND
    if not isinstance(kind, DirectKind | CompiledKind) or kind.id is not extractor:
        raise TypeError(f"kinds/{extractor.value}.py: KIND is not the kind of {extractor!r}")
    return kind


KINDS: Mapping[Extractor, AnyKind] = MappingProxyType(
    {extractor: _load(extractor) for extractor in Extractor if extractor is not Extractor.AUTO}
)
"""The kind of each extractor except AUTO, which chooses the first kind that can serve a request.

AUTO considers a compiled kind only once its plan is ready.
"""

(REFERENCE,) = (kind for kind in KINDS.values() if isinstance(kind, ReferenceKind))
"""The kind that runs the model itself. It needs no proof; other kinds are compared with it."""


def kind_of(extractor: Extractor) -> AnyKind:
    """Return an extractor's kind; raise ValueError for AUTO."""
    if extractor is Extractor.AUTO:
        raise ValueError("AUTO is a choice between extractors, not an extractor")
    return KINDS[extractor]
