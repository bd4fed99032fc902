"""What is kept for one run of the tests: catalogues and compiled plans.

A net that many tests load is measured by the first of them. The others verify what was kept, as a
restart does. Tests of how models are measured use no cache, or a folder of their own.

The results of races are not shared: which extractor AUTO takes must not depend on other tests.
"""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.plan_folder import user_cache


class _WithoutRaces(PlanCache):
    def races(self, digest: str) -> Path:
        """Return a path that no other model has."""
        return super().races(f"{digest}-{uuid4()}")


def kept() -> PlanCache:
    """Return the cache of this run; conftest.py makes its folder."""
    return _WithoutRaces(user_cache() / "plans", 1 << 30)
