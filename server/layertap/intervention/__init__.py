"""Interventions: changes of a model's values while it runs, as a request describes them.

Without PyTorch. An intervention is data: it names a layer, a part of the layer's value and one of a
fixed list of operations. It never contains code, pickles or paths.
"""

from layertap.intervention.intervention import MAX_SETS, Intervention, SiteKey
from layertap.intervention.operation import Operation
from layertap.intervention.part import Axis, Part, Span, Where
from layertap.intervention.several import (
    MAX_INDEXES,
    MAX_INTERVENTIONS,
    InterventionsLike,
    check_count,
    check_interventions,
    parse_interventions,
)

__all__ = [
    "MAX_INDEXES",
    "MAX_INTERVENTIONS",
    "MAX_SETS",
    "REPORT_PREFIX",
    "Axis",
    "Intervention",
    "InterventionsLike",
    "Operation",
    "Part",
    "SiteKey",
    "Span",
    "Where",
    "check_count",
    "check_interventions",
    "parse_interventions",
]

REPORT_PREFIX = "interventions."
"""How the names begin under which a reply tells what interventions changed."""
