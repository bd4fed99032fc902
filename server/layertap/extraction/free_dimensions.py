"""Finds which dimensions of a model's inputs may have another size, and which must be equal.

Note [Dimensions that go together]
    The model is run with one dimension at half or at twice its size. If it runs, the dimension is
    free. Dimensions of equal size that can't change alone are then changed together: height and
    width of a model that takes only squares, or the length of token ids and of their mask. If the
    model runs, they are free and have one name, so that a request in which they differ is refused
    for that reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from layertap.models import BatchKey, InputSpec, LoadedModel, Signature

__all__ = ["free_dimensions"]

MAX_PAIRS = 8
"""Maximum number of dimensions with which each other one is changed as a pair."""

Runs = Callable[[BatchKey], bool]
"""Returns whether the model runs on items with a key."""


class _Place(NamedTuple):
    """A dimension: the name of the input, and the index in its item."""

    name: str
    axis: int


def free_dimensions(model: LoadedModel, runs: Runs) -> Signature:
    """Return a model's signature with its free dimensions; see Note [Dimensions that go together].

    Inputs whose free dimensions are not a guess are not changed.

    Args:
        model: The model.
        runs: Runs it on random input.
    """
    signature = model.signature
    open_inputs = [each for each in signature.inputs if each.guess and each.guess.free]
    if not open_inputs:
        return signature
    trial = _Trial(signature, runs)
    places = [_Place(each.name, axis) for each in open_inputs for axis in range(len(each.shape))]
    alone = [place for place in places if trial.runs_at_others([place])]
    alike: dict[int, list[_Place]] = defaultdict(list)
    for place in places:
        if place not in alone:
            alike[trial.size(place)].append(place)
    tied = [group for candidates in alike.values() for group in _groups(candidates, trial)]
    return _named(signature, open_inputs, alone, tied)


def _groups(places: Sequence[_Place], trial: _Trial) -> Iterator[list[_Place]]:
    """Yield groups of equal dimensions that can only change together, as small as possible.

    For two images of one size, the heights are one group and the widths are another. The model also
    runs if all four change together, but that group would say that images must be square.
    """
    left = list(places)
    while left:
        first, *others = left
        along = [place for place in left if place.axis == first.axis]
        candidates = [[first, other] for other in others[:MAX_PAIRS]]
        candidates += [group for group in (along, left) if len(group) > 2]
        found = next((group for group in candidates if trial.runs_at_others(group)), None)
        if found is not None:
            yield found
        left = [place for place in left if place not in (found or [first])]


class _Trial:
    """Runs a model at other sizes of its dimensions."""

    def __init__(self, signature: Signature, runs: Runs) -> None:
        self._key = signature.whole_key
        self._runs = runs
        self._shapes = {item.name: item.shape for item in self._key.items}

    def size(self, place: _Place) -> int:
        """Return the default size of a dimension."""
        return self._shapes[place.name][place.axis]

    def runs_at_others(self, places: Sequence[_Place]) -> bool:
        """Return whether the model runs with these dimensions at half or twice their size."""
        size = self.size(places[0])
        # Not at 1, as a size of 1 may be broadcast to any size.
        return any(
            self._runs(self._at(places, other)) for other in (size // 2, 2 * size) if other > 1
        )

    def _at(self, places: Sequence[_Place], size: int) -> BatchKey:
        key = self._key
        for name, shape in self._shapes.items():
            axes = [place.axis for place in places if place.name == name]
            if axes:
                other = [size if axis in axes else own for axis, own in enumerate(shape)]
                key = key.with_shape(name, other)
        return key


def _named(
    signature: Signature,
    open_inputs: Sequence[InputSpec],
    alone: Sequence[_Place],
    tied: Sequence[Sequence[_Place]],
) -> Signature:
    """Return a signature with free dimensions; those that must be equal get the same name."""
    shared = {place: group for group in tied for place in group}
    names: dict[_Place, str] = {}
    used = _names_in(signature, open_inputs)
    for spec in open_inputs:
        free = [p for axis in range(len(spec.shape)) if (p := _Place(spec.name, axis)) in shared
                or p in alone]  # fmt: skip
        found = replace(spec, free=tuple(place.axis for place in free), symbols=())
        for place, conventional in zip(free, found.free_names, strict=True):
            if place not in names:
                name = next(
                    each for each in _candidates(conventional, spec.name) if each not in used
                )
                used.add(name)
                names.update(dict.fromkeys(shared.get(place, [place]), name))
        symbols = tuple(names[place] for place in free)
        if len(signature.inputs) == 1 and len(set(symbols)) == len(symbols):
            symbols = ()  # The conventional names.
        signature = signature.with_input(replace(found, symbols=symbols))
    return signature


def _names_in(signature: Signature, open_inputs: Sequence[InputSpec]) -> set[str]:
    known = [each for each in signature.inputs if each not in open_inputs]
    return {name for each in known for name in each.free_names}


def _candidates(conventional: str, name: str) -> Iterator[str]:
    """Yield names for a free dimension: the usual one, then ones with the input's name."""
    yield conventional
    yield f"{name}_{conventional}"
    number = 2
    while True:
        yield f"{name}_{conventional}{number}"
        number += 1
