"""Why some layers can't be served by extractors that don't run the model itself, in words."""

from __future__ import annotations

__all__ = ["LOOKS", "RANDOM", "SOMETIMES", "calls_function", "takes_step"]

LOOKS = (
    "before it the model's code looks at values (bool, int or item of a tensor): a trace would go "
    "the example's way for every input"
)

RANDOM = (
    "before it the model draws random numbers: two passes on one input differ, so the extractor "
    "can't be compared with the model"
)


SOMETIMES = "the layer has that value for some inputs only"


def calls_function(name: str) -> str:
    """Return what is said of a layer behind a Python function of autograd."""
    return (
        f"before it the model calls {name}, a Python autograd.Function, which a compiled program "
        f"can't hold"
    )


def takes_step(operation: str) -> str:
    """Return what is said of a layer behind a discontinuous operation, see ``steps``."""
    return (
        f"its value follows from {operation} of computed numbers, which is discontinuous: a "
        f"compiled program rounds differently, and near a tie that gives another result"
    )
