"""Why some layers can't be served by extractors that don't run the model itself, in words."""

from __future__ import annotations

__all__ = ["LOOKS", "RANDOM", "calls_function", "cause_of", "takes_step"]

_LONGEST = 200

LOOKS = (
    "before it the model's code looks at values (bool, int or item of a tensor): a trace would go "
    "the example's way for every input"
)

RANDOM = (
    "before it the model draws random numbers: two passes on one input differ, so the extractor "
    "can't be compared with the model"
)


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


def cause_of(error: BaseException) -> str:
    """Return an error's type and message in one line, without the traces that torch puts into it.

    The interpreter of compiled programs writes its own trace first and the message last.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if any("Traceback of TorchScript" in line for line in lines):
        return lines[-1][:_LONGEST]
    return f"{type(error).__name__}: {lines[0]}"[:_LONGEST]
