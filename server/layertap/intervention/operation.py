"""What an intervention does to a value."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Operation"]


class Operation(StrEnum):
    """What is done to a part of a value; ``layertap.v1.Operation`` has the same names."""

    ZERO = "zero"
    SET = "set"
    """Every element becomes a number."""
    MEAN = "mean"
    """Every element becomes the mean over some axes of the selected part."""
    SCALE = "scale"
    """Multiplies by a number."""
    ADD = "add"
    """Adds a tensor times a factor."""
    REPLACE = "replace"
    """The elements of a tensor."""
    PATCH = "patch"
    """The same part of another item of the batch."""
    PROJECT_OUT = "project_out"
    """Removes the component along a direction of the channels."""
    PROJECT_KEEP = "project_keep"
    """Keeps only that component."""
    CAP = "cap"
    """Limits that component to a range."""
    CLAMP = "clamp"
    """Limits every element to a range."""
    NOISE = "noise"
    """Adds normally distributed numbers, from a seed."""
    SKIP = "skip"
    """What the module was given, as if it were not there."""

    @property
    def takes_tensor(self) -> bool:
        """Whether it needs a tensor."""
        return self in (Operation.ADD, Operation.REPLACE) or self.takes_direction

    @property
    def takes_direction(self) -> bool:
        """Whether its tensor is a direction: one number for each channel."""
        return self in (Operation.PROJECT_OUT, Operation.PROJECT_KEEP, Operation.CAP)

    @property
    def takes_range(self) -> bool:
        """Whether it needs a lower or an upper limit."""
        return self in (Operation.CAP, Operation.CLAMP)
