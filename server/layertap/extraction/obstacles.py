"""Reasons why an extractor that doesn't run the model itself can't serve some layers."""

from __future__ import annotations

__all__ = [
    "DRAWS_NUMBERS",
    "SOMETIMES",
    "UNREPEATED",
    "no_guard",
    "runs_python",
    "takes_step",
]

DRAWS_NUMBERS = (
    "before it the model draws random numbers: two passes on the same input differ, so the "
    "extractor can't be compared with the model"
)


SOMETIMES = "the layer returns this value only for some inputs"


UNREPEATED = (
    "before it the model's code looks at a number that was different for each sample: there would "
    "be a compiled plan for each input"
)


def no_guard(reason: str) -> str:
    """Return the reason for a layer after a look at a value for which there is no guard.

    Args:
        reason: Why not, as a clause about the value.
    """
    return (
        f"before it the model's code branches on tensor values (bool, int or item), and no guard "
        f"can determine beforehand which branch it takes: {reason}"
    )


def runs_python(what: str) -> str:
    """Return why a layer after something that runs in Python can't be compiled.

    Args:
        what: What the model does, as a clause; see Note [Code in Python].
    """
    return f"before it the model {what}, which a compiled program can't contain"


def takes_step(operation: str) -> str:
    """Return why a layer after a discontinuous operation can't be compiled; see ``steps``."""
    return (
        f"its value depends on {operation} of computed numbers, which is discontinuous: a "
        f"compiled program rounds differently, which can give a very different result"
    )
