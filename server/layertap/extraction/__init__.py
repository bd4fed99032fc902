"""Captures values of a model's layers: taps, the extractors, catalogue and plans."""

from layertap.extraction.catalogue import Catalogue, LayerEntry, Support
from layertap.extraction.measure import measure
from layertap.extraction.plan import Plan
from layertap.extraction.plan_builder import PlanBuilder
from layertap.extraction.points import CapturePoint, Dim, PointKind, ValueSpec
from layertap.extraction.prover import Prover
from layertap.extraction.taps import Taps

__all__ = [
    "CapturePoint",
    "Catalogue",
    "Dim",
    "LayerEntry",
    "Plan",
    "PlanBuilder",
    "PointKind",
    "Prover",
    "Support",
    "Taps",
    "ValueSpec",
    "measure",
]
