from __future__ import annotations

from layertap import models


def test_all_is_true() -> None:
    """Each name in ``__all__`` exists; the names are sorted and unique."""
    assert models.__all__ == sorted(
        set(models.__all__), key=lambda name: (not name.isupper(), name.islower(), name)
    )
    assert all(hasattr(models, name) for name in models.__all__)
