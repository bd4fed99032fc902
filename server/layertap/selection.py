"""Selections of layers, extractors and reductions, shared by client, server and command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Self

from layertap.errors import InvalidInputError

__all__ = [
    "SENT_DTYPES",
    "Capture",
    "Extractor",
    "Glob",
    "LayerSelection",
    "Reduction",
    "SelectionLike",
    "as_extractor",
    "is_glob",
    "parse_selections",
]


SENT_DTYPES = ("float32", "float16", "bfloat16")
"""The types in which a selection may have floating-point values sent."""


class Extractor(StrEnum):
    """A way to take a layer's value; ``layertap.v1.Extractor`` has the same names.

    The order is the one in which AUTO prefers them. What each does stands in
    ``layertap.extraction.kinds``, in the module with its name.

    Attributes:
        letter: What tables call it; empty for AUTO.
    """

    letter: str

    def __new__(cls, value: str, letter: str = "") -> Self:
        """Make a member of its value, with the letter next to it."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.letter = letter
        return member

    AUTO = "auto"
    TORCHSCRIPT = "torchscript", "T"
    HOOK = "hook", "H"
    FX = "fx", "F"
    LAYER_GETTER = "layer_getter", "L"
    CHILDREN = "children", "C"


def as_extractor(name: Extractor | str) -> Extractor:
    """Return an extractor by its name; raise InvalidInputError for one that there is not."""
    try:
        return Extractor(name)
    except ValueError:
        raise InvalidInputError(
            f"extractor: got {name!r}, expected one of {', '.join(Extractor)}"
        ) from None


class Capture(StrEnum):
    """Which side of a layer is meant; ``layertap.v1.Capture`` has the same names."""

    OUTPUT = "output"
    INPUT = "input"


class Reduction(StrEnum):
    """What to do with a value before it is sent; ``layertap.v1.Reduction`` has the same names."""

    NONE = "none"
    GLOBAL_AVERAGE_POOL = "global_average_pool"
    FLATTEN = "flatten"
    CLASS_TOKEN = "class_token"
    TOKEN_GRID = "token_grid"


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """A layer to return.

    Attributes:
        layer: A catalogue name or a glob over the names.
        capture: Which side of the layer.
        alias: The name in the reply; empty for ``layer`` or ``layer:input``.
        reduction: What to do with the value before it is sent.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to send floating-point values in;
            empty for the type that the model produced.

    Raises:
        InvalidInputError: For a side or a reduction that there is not; their names will do as well
            as their members.
    """

    layer: str
    capture: Capture = Capture.OUTPUT
    alias: str = ""
    reduction: Reduction = Reduction.NONE
    dtype: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("capture", Capture), ("reduction", Reduction)):
            given = getattr(self, name)
            if not isinstance(given, kind):
                object.__setattr__(self, name, _member(name, given, kind))

    @classmethod
    def parse(cls, text: str) -> LayerSelection:
        r"""Read ``LAYER[:input|:output][=ALIAS]``, such as ``avgpool:input=before``.

        A colon, an equals sign or a backslash that belongs to the layer's name has a backslash in
        front: ``heads.a\=b``.
        """
        target, equals, alias = _cut(text, "=")
        layer, colon, side = _cut(target, ":")
        if not layer or (equals and not alias):
            raise InvalidInputError(f"layer: got {text!r}, expected LAYER[:input|:output][=ALIAS]")
        if colon and side not in tuple(Capture):
            raise InvalidInputError(
                f"layer: got {text!r}, expected 'input' or 'output' after the colon; a colon in "
                f"the layer's own name is written '\\:'"
            )
        return cls(_ESCAPED.sub(r"\1", layer), Capture(side) if colon else Capture.OUTPUT, alias)

    def name_for(self, layer: str) -> str:
        """Return the name in the reply of ``layer``, one of this selection's matches."""
        if self.alias:
            return self.alias
        return layer if self.capture is Capture.OUTPUT else f"{layer}:input"


_ESCAPED = re.compile(r"\\([:=\\])")


def _cut(text: str, sign: str) -> tuple[str, str, str]:
    """Part a text at the first sign that has no backslash in front of it, as str.partition does."""
    place = next((m for m in re.finditer(rf"\\.|{sign}", text) if m.group() == sign), None)
    return (text[: place.start()], sign, text[place.end() :]) if place else (text, "", "")


def _member(name: str, given: object, kind: type[Capture] | type[Reduction]) -> StrEnum:
    try:
        return kind(str(given).lower())
    except ValueError:
        raise InvalidInputError(
            f"{name}: got {given!r}, expected one of {', '.join(kind)}"
        ) from None


def is_glob(name: str) -> bool:
    """Return whether a selection's layer is a glob."""
    return any(sign in name for sign in "*?")


class Glob:
    """A glob over names, matched in full; see Note [Globs].

    ``*`` and ``?`` stay within one component of a path, ``**`` crosses components.

    Note [Globs]
        A glob comes from anybody. As a regular expression ``**?**?**?`` and so on takes years on a
        name that it doesn't match, and Python holds every other thread up meanwhile. So all ways
        through the glob are walked at once, a bit for each place in it: one step a character.
    """

    def __init__(self, text: str) -> None:
        # A run of stars with two of them says what two say.
        self._parts = [part for part in re.split(r"(\*\*+|\*|\?)", text) if part]
        # Longer than any name, a glob is never laid out.
        self._least = sum(len(part) for part in self._parts if not part.startswith("*"))

    def matches(self, name: str) -> bool:
        """Return whether the glob matches a whole name."""
        if len(name) < self._least:
            return False
        steps = self._steps
        places = steps.past_stars(1)
        for char in name:
            inside = char != "."
            stay = places & (steps.deep | (steps.shallow if inside else 0))
            go = places & (steps.literal.get(char, 0) | (steps.single if inside else 0))
            places = steps.past_stars(stay | go << 1)
        return bool(places >> steps.length)

    @cached_property
    def _steps(self) -> _Steps:
        return _Steps(self._parts)


class _Steps:
    """Where in a glob each kind of step may be taken: bit n stands before the n-th sign."""

    def __init__(self, parts: Iterable[str]) -> None:
        self.deep = self.shallow = self.single = self.length = 0
        self.literal: dict[str, int] = {}
        for part in parts:
            signs = [part] if part[0] in "*?" else part
            for sign in signs:
                self._add(sign, 1 << self.length)
                self.length += 1

    def past_stars(self, places: int) -> int:
        """Return places with those after their stars, which may stand for nothing."""
        return places | (places & (self.deep | self.shallow)) << 1

    def _add(self, sign: str, place: int) -> None:
        if sign == "*":
            self.shallow |= place
        elif sign.startswith("*"):
            self.deep |= place
        elif sign == "?":
            self.single |= place
        else:
            self.literal[sign] = self.literal.get(sign, 0) | place


SelectionLike = str | LayerSelection | Mapping[str, str] | Iterable[str | LayerSelection]


def parse_selections(layers: SelectionLike) -> list[LayerSelection]:
    """Normalise what a caller may write for layers.

    Args:
        layers: One name, a LayerSelection, a list of either, or a mapping of names to aliases (the
            ``return_nodes`` convention of torchvision's ``create_feature_extractor``).

    Raises:
        InvalidInputError: For a text that is not ``LAYER[:input|:output][=ALIAS]``.
    """
    if isinstance(layers, str | LayerSelection):
        layers = [layers]
    if isinstance(layers, Mapping):
        layers = [f"{layer}={alias}" for layer, alias in layers.items()]
    return [s if isinstance(s, LayerSelection) else LayerSelection.parse(s) for s in layers]
