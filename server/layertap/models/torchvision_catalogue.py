"""Torchvision's builders and weights by name; errors suggest close matches."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from torch import nn
from torchvision import models

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models.weights import DEFAULT

__all__ = ["Builder", "Family", "find_builder"]


class Family(StrEnum):
    """A task of torchvision; the value is the name of its subpackage of ``torchvision.models``."""

    CLASSIFICATION = "classification"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"
    VIDEO = "video"
    OPTICAL_FLOW = "optical_flow"
    QUANTIZATION = "quantization"


_REFUSED = {
    Family.OPTICAL_FLOW: "it compares two images, and layertap gives a model one input",
    Family.QUANTIZATION: (
        "layertap serves no quantized models; use the float model of the same name"
    ),
}


@dataclass(frozen=True, slots=True)
class Builder:
    """One of torchvision's model builders.

    Attributes:
        name: Its registered name, such as ``"resnet18"``.
        build: The builder itself.
        family: Its task, which determines the input and the preprocessing.
        members: Its weights by name, as members of a ``torchvision.models.WeightsEnum``.
    """

    name: str
    build: Callable[..., nn.Module]
    family: Family
    members: dict[str, Any]

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the builder's arguments."""
        return frozenset(inspect.signature(self.build).parameters)

    def member(self, weights: str) -> Any:
        """Return a weights member by name, with or without the name of its class and a dot.

        Raises:
            WeightsUnavailableError: There is no such member; the message lists all members.
        """
        members = self.members
        full = {str(member): member for member in members.values()}
        found = members.get(weights, full.get(weights))
        if found is None:
            choices = [DEFAULT, *(name for name in members if name != DEFAULT)]
            raise WeightsUnavailableError(
                f"weights of {self.name}: got {weights!r}, expected one of {', '.join(choices)}, "
                f"the path of a state dict, or 'random'{_close(weights, choices)}"
            )
        return found

    def published(self, path: str) -> Any | None:
        """Return the member whose published file has this path's base name, or None."""
        name = PurePath(path).name
        for member in self.members.values():
            if PurePath(member.url).name == name:
                return member
        return None

    def reference(self) -> Any:
        """Return the member whose transforms are used for weights of unknown origin.

        That is the original ImageNet recipe if there is one. Otherwise it is the member for the
        smallest images, the size for which torchvision builds the untrained model.
        """
        if self.family is not Family.CLASSIFICATION:
            return self.members[DEFAULT]
        original = self.members.get("IMAGENET1K_V1")
        return original or min(self.members.values(), key=lambda m: m.transforms().crop_size)


def find_builder(name: str) -> Builder:
    """Return torchvision's builder with this name.

    Raises:
        ModelLoadError: torchvision has no such builder, or layertap can't serve its models.
    """
    names = models.list_models()
    if name not in names:
        servable = [known for known in names if _family(known) not in _REFUSED]
        raise ModelLoadError(
            f"model {name!r}: torchvision has no such model{_close(name, servable)}; a file needs "
            "its suffix (.pt) and a factory its function (package.module:function)"
        )
    family = _family(name)
    if family in _REFUSED:
        raise ModelLoadError(f"model {name!r} can't be served: {_REFUSED[family]}")
    # ``__members__`` includes the alias DEFAULT, which iteration skips.
    members = dict(models.get_model_weights(name).__members__)
    return Builder(name, models.get_model_builder(name), family, members)


def _family(name: str) -> Family:
    # torchvision.models.resnet is a module, while torchvision.models.video.resnet is in a family.
    parts = models.get_model_builder(name).__module__.split(".")
    return Family(parts[2]) if len(parts) > 3 else Family.CLASSIFICATION


def _close(text: str, choices: Iterable[str]) -> str:
    matches = difflib.get_close_matches(text, list(choices), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
