"""The extractors whose plans tests can build at every turn."""

from __future__ import annotations

from layertap import Extractor
from layertap.extraction.kinds.registry import KINDS

QUICK = tuple(each for each in KINDS if not getattr(KINDS[each], "slow", False))
"""Every extractor but EXPORT, whose packages take long to compile; test_export.py is about it."""

SLOW = frozenset(Extractor) - {*QUICK, Extractor.AUTO}
