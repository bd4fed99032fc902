"""What is kept for one run of the tests: catalogues and compiled plans.

A net that many tests load is measured by the first of them. The others verify what was kept, as a
restart does. Tests of how models are measured use no cache, or a folder of their own.
"""

from __future__ import annotations

from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.plan_folder import open_plan_cache


def kept() -> PlanCache:
    """Return the cache of this run; conftest.py makes its folder."""
    cache = open_plan_cache("auto", 1 << 30)
    assert cache is not None
    return cache
