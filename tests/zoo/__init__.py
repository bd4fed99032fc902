"""The zoo: models that are awkward to serve, each held against a fresh instance of itself."""

from __future__ import annotations

import importlib
import warnings

from zoo.specimen import Specimen, specimens_in

__all__ = ["HOUSES", "every_specimen"]

HOUSES = (
    "remembering", "within", "outside", "coupled", "branching", "values", "results", "wiring",
    "sequences", "programs",
)  # fmt: skip
"""The files of the zoo, one for each kind of awkwardness."""


def every_specimen() -> dict[str, Specimen]:
    """Return all specimens by name, house by house."""
    found: dict[str, Specimen] = {}
    for house in HOUSES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and models have it.
            found.update(specimens_in(importlib.import_module(f"zoo.{house}")))
    return found
