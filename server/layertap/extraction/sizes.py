"""Runs a model at several sizes of its inputs, to find how the sizes of its activations follow.

Note [Which sizes are tried]
    The first sizes lie next to round ones, below and above, as that is where a convolution with
    padding and one without differ. Each further size is the one that rules out most of what is
    still possible (see ``dimensions``). Small sizes are preferred, as they take less time. In the
    end the model runs at two sizes that were not used before, with batches of two and three items;
    an expression that is wrong there is given up.

    A model may refuse sizes: a U-Net those that are not multiples of 8, a text model those above
    its number of position embeddings. So it is found out first of which number sizes are multiples,
    and which dimensions can only change together, such as height and width of a model that takes
    squares.

    The nodes of the symbolic graph run at the last two sizes, and are looked up among the
    expressions that were found for modules. Where several of those fit, they run at a few more.

    All this takes ten to twenty passes. A model whose passes take seconds would take a minute
    longer to load, so its expressions are not looked for; its shapes are measured when a request
    has another size.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from layertap.extraction.dimensions import Expression, Sizes, Solver
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.survey import Shapes, survey_shapes
from layertap.models import Batch, BatchKey, LoadedModel, free_sizes, resized

__all__ = ["Expressions", "survey_sizes"]

_log = logging.getLogger(__name__)

MAX_PASSES = 26
"""Passes of one model at sizes other than its default one, those that it refuses included."""

MAX_SECONDS = 2.0
"""Duration of a pass, and of the same one once more, above which no further sizes are tried."""

_STEPS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of which a model may require that a size is a multiple."""

_ROUND = 32
"""The stride of usual vision models: they differ most at sizes next to multiples of it."""

_CONFIRMING = (2, 3)
"""Items of the batches that confirm what was found."""

_NODES = 4
"""Passes in which nodes are looked at besides those that confirm what was found."""

_CHOICE = 192
"""Sizes anywhere in the range among which the next one is chosen."""

_EVERY = 20_000
"""Sizes among which it is chosen where those tell nothing more."""

_SMALL = 160
"""Up to so large sizes are tried where the default one is much smaller."""

Expressions = Mapping[CapturePoint, tuple[Expression | None, ...]]
"""For each point, the elements of each dimension for one item; None where that is not known."""


@dataclass(frozen=True)
class _Knob:
    """Free dimensions of the inputs that change together, mostly one alone.

    Attributes:
        symbols: Their names.
        default: Their size at which the catalogue was measured.
        step: The sizes that the model takes are multiples of it, as far as is known.
        before: Whether it takes the sizes before those too, as a U-Net does that rounds up.
    """

    symbols: tuple[str, ...]
    default: int
    step: int = 1
    before: bool = False

    def of(self, sizes: Sizes) -> int:
        """Return its size."""
        return sizes[self.symbols[0]]

    def first(self, low: float, high: float) -> list[int]:
        """Return sizes at and next to two round ones, which are shares of the default one."""
        usual = min(_ROUND, 1 << max(0, int(math.log2(max(1.0, self.default / 3.5)))))
        unit = max(usual, self.step)
        lower = math.ceil(low * self.default / unit) * unit
        upper = max(math.ceil(high * self.default / unit) * unit, lower + unit)
        sizes = [upper + self.step, lower, upper - self.step,
                 lower + self.step, upper, lower - self.step]  # fmt: skip
        return [size for size in sizes if size > 1 and size != self.default] or [self.default]

    def within(self, least: int, most: int, generator: random.Random) -> int:
        """Return a size in a range that the step allows."""
        low = max(1, math.ceil(least / self.step))
        size = self.step * generator.randint(low, max(low, most // self.step))
        return size - generator.randint(0, 1) if self.before else size


def survey_sizes(
    model: LoadedModel,
    key: BatchKey,
    specs: Mapping[CapturePoint, ValueSpec],
    turn: AbstractContextManager[object],
    nodes: Callable[[Batch], Shapes],
) -> Expressions:
    """Find how the size of each dimension follows the inputs' free dimensions.

    See Note [Which sizes are tried].

    Args:
        model: The model; no other forward pass of it may run meanwhile.
        key: The inputs at which the specs were measured.
        specs: The type and shape of each point.
        turn: Held in each pass.
        nodes: Returns the shapes of the points that are nodes, for a batch.

    Returns:
        The expressions of each point whose shape follows nothing but the sizes of the inputs; a
        point of which nothing is known may be missing.
    """
    specs = {point: spec for point, spec in specs.items() if not spec.dynamic}
    defaults = free_sizes(model.signature, key)
    if defaults is None:
        return {}
    if not defaults:
        return {p: tuple(Expression(dim.size) for dim in spec.dims) for p, spec in specs.items()}
    try:
        return _Survey(_Runs(model, key, turn, nodes), specs, defaults).expressions()
    except _TooSlowError as error:
        _log.info("model %s: %s", model.name, error)
        return {}


class _TooSlowError(Exception):
    """A pass took too long for a model to be run at many sizes."""


class _Runs:
    """Runs a model at other sizes, and counts the passes."""

    def __init__(
        self,
        model: LoadedModel,
        key: BatchKey,
        turn: AbstractContextManager[object],
        nodes: Callable[[Batch], Shapes],
    ) -> None:
        self._model = model
        self._key = key
        self._turn = turn
        self._nodes = nodes
        self.passes = 0

    def shapes(self, sizes: Sizes, batch: int = 1, *, nodes: bool = False) -> Shapes | None:
        """Return the shapes of a pass; None if the model does not take such sizes."""
        self.passes += 1
        key = resized(self._model.signature, self._key, sizes)
        x = ordinary_batch(self._model, batch, key)
        shapes, ended, seconds = self._timed(x)
        if seconds > MAX_SECONDS:
            # Perhaps the machine was busy with something else for a moment.
            shapes, ended, seconds = self._timed(x)
        if seconds > MAX_SECONDS:
            raise _TooSlowError(
                f"a pass takes {seconds:.1f} s, so how shapes follow the sizes of the input was "
                f"not found out; they are measured when a request has another size"
            )
        if not ended:
            return None
        return {**shapes, **self._of_nodes(x)} if nodes else shapes

    def _timed(self, x: Batch) -> tuple[Shapes, bool, float]:
        """Run the model; return what ``survey_shapes`` does, and the seconds that it took."""
        begin = time.monotonic()
        shapes, ended = survey_shapes(self._model, x, self._turn)
        return shapes, ended, time.monotonic() - begin

    def _of_nodes(self, x: Batch) -> Shapes:
        try:
            return self._nodes(x)
        except Exception as error:  # noqa: BLE001 - a graph may hold the sizes of its example
            _log.debug("the symbolic graph does not run on %s: %s", x.key, error)
            return {}


class _Survey:
    """Finds the expressions of one model.

    Args:
        runs: Runs the model.
        specs: The type and shape of each point at the default sizes.
        defaults: Those sizes.
    """

    def __init__(
        self, runs: _Runs, specs: Mapping[CapturePoint, ValueSpec], defaults: Sizes
    ) -> None:
        self._runs = runs
        self._specs = specs
        self._defaults = defaults
        self._seen: list[tuple[Sizes, Shapes]] = []
        self._refused: list[Sizes] = []
        self._random = random.Random(0)

    def expressions(self) -> Expressions:
        """Return what ``survey_sizes`` does."""
        knobs = self._knobs()
        self._refused.clear()  # What they show is the steps.
        for low, high in ((0.3, 0.6), (0.6, 0.85)):
            if len(self._seen) < 4:
                for sizes in self._first(knobs, low, high):
                    self._run(sizes)
        if not self._seen:
            return {}
        solver: Solver[tuple[CapturePoint, int]] = Solver(
            {symbol: knob.step for knob in knobs for symbol in knob.symbols}
        )
        solver.add(self._defaults, self._sizes(_measured(self._specs)))
        for sizes, shapes in self._seen:
            solver.add(sizes, self._sizes(shapes))
        points, thorough = self._choice(knobs), False
        while self._runs.passes < MAX_PASSES - len(_CONFIRMING):
            telling = solver.telling(list(filter(self._is_new, points)))
            if telling is None and thorough:
                break
            if telling is None:
                # What is left differs at few sizes only.
                points, thorough = self._every(knobs), True
            elif (run := self._run(telling)) is not None:
                solver.add(telling, self._sizes(run))
        domain = [*self._choice(knobs), *self._choice(knobs, up_to=4)]
        return self._confirmed(knobs, solver.expressions(domain), domain)

    def _run(self, sizes: Sizes) -> Shapes | None:
        """Return the shapes of a pass on one item, and remember them; None if it fails."""
        shapes = self._runs.shapes(sizes)
        if shapes is not None:
            self._seen.append((sizes, shapes))
        else:
            self._refused.append(sizes)
        return shapes

    def _range(self, knob: _Knob, up_to: float) -> tuple[int, int]:
        """Return the smallest and the largest size of a knob that is worth trying."""
        least = min(knob.of(seen) for seen, _ in self._seen)
        return least, max(int(up_to * knob.default), min(4 * knob.default, _SMALL))

    def _every(self, knobs: Sequence[_Knob]) -> list[Sizes]:
        """Return points that have each size of each knob once or more, small ones first."""
        ranges = {}
        for knob in knobs:
            least, most = self._range(knob, 1.5)
            before = [size - 1 for size in range(least, most + 1, knob.step) if knob.before]
            ranges[knob] = sorted({*range(least, most + 1, knob.step), *before})[:_EVERY]
        points = []
        for index in range(max(map(len, ranges.values()), default=0)):
            sizes = dict(self._defaults)
            for number, (knob, values) in enumerate(ranges.items()):
                # Not the same share of each, so that height and width can be told apart.
                size = values[(index + number * len(values) // 3) % len(values)]
                sizes |= dict.fromkeys(knob.symbols, size)
            points.append(sizes)
        return sorted(points, key=lambda sizes: math.prod(sizes.values()))

    def _is_new(self, sizes: Sizes) -> bool:
        """Return whether a pass at some sizes was not run yet, and may well succeed."""
        if sizes in (self._defaults, *self._refused, *(seen for seen, _ in self._seen)):
            return False
        return not any(
            sizes[symbol] >= size > self._defaults[symbol]
            for refused in self._refused
            for symbol, size in refused.items()
        )

    def _sizes(self, shapes: Shapes) -> dict[tuple[CapturePoint, int], int]:
        """Return the size of each dimension of the modules' points."""
        return {
            (point, axis): size
            for point, shape in shapes.items()
            if point.kind is PointKind.MODULE
            and point in self._specs
            and len(shape) == len(self._specs[point].dims)
            for axis, size in enumerate(shape)
        }

    def _knobs(self) -> list[_Knob]:
        """Return what can be changed of the inputs' sizes, and in which steps."""
        alone = [_Knob((symbol,), default) for symbol, default in self._defaults.items()]
        if self._takes(alone):
            return alone
        alike: dict[int, tuple[str, ...]] = {}
        for symbol, default in self._defaults.items():
            alike[default] = (*alike.get(default, ()), symbol)
        tied = [_Knob(symbols, default) for default, symbols in alike.items()]
        if len(tied) == len(alone):
            tied = []
        if tied and self._takes(tied):
            return tied
        for knobs in (alone, tied):
            for step in _STEPS[1:]:
                stepped = [replace(k, step=1 if k.default % step else step) for k in knobs]
                if any(knob.step > 1 for knob in stepped) and self._takes(stepped):
                    return [self._loosened(knob) for knob in stepped]
        return [knob for knob in alone if self._takes([knob])]

    def _loosened(self, knob: _Knob) -> _Knob:
        """Return a knob with all of the sizes that the model takes."""
        free = replace(knob, step=1)
        if knob.step > 1 and self._takes([free]):
            return free  # The step was needed for another knob.
        return replace(knob, before=knob.step > 2 and self._takes([knob], less=1))

    def _takes(self, knobs: Sequence[_Knob], less: int = 0) -> bool:
        """Return whether the model takes other sizes of some knobs: odd multiples of their steps.

        Args:
            knobs: What is changed.
            less: What is subtracted from each size.
        """
        sizes = dict(self._defaults)
        for index, knob in enumerate(knobs):
            share = (0.6, 0.85)[index % 2] * knob.default
            step = knob.step
            # Not a multiple of the next step either.
            size = step * (2 * (round(share / step) // 2) + 1)
            if step == 1 and size > 16:
                size -= size % 8 - 5  # Nor next to a multiple.
            if size in (1, knob.default):
                size += 2 * step
            sizes |= dict.fromkeys(knob.symbols, size - less)
        return self._run(sizes) is not None

    def _first(self, knobs: Sequence[_Knob], low: float, high: float) -> Iterator[Sizes]:
        """Yield the first sizes to try."""
        columns = [knob.first(low, high) for knob in knobs]
        for row in range(max(map(len, columns), default=0)):
            sizes = dict(self._defaults)
            for index, (knob, column) in enumerate(zip(knobs, columns, strict=True)):
                # Other pairs each time, so that height and width can be told apart.
                sizes |= dict.fromkeys(knob.symbols, column[(row + index) % len(column)])
            yield sizes

    def _choice(self, knobs: Sequence[_Knob], up_to: float = 1.5) -> list[Sizes]:
        """Return sizes that the model may take, small ones first.

        Args:
            knobs: What can be changed.
            up_to: The largest size, as a multiple of the default one.
        """
        found: dict[tuple[int, ...], Sizes] = {}
        for _ in range(_CHOICE):
            sizes = dict(self._defaults)
            for knob in knobs:
                least, most = self._range(knob, up_to)
                sizes |= dict.fromkeys(knob.symbols, knob.within(least, most, self._random))
            found[tuple(sizes.values())] = sizes
        return sorted(found.values(), key=lambda sizes: math.prod(sizes.values()))

    def _confirmed(
        self,
        knobs: Sequence[_Knob],
        found: Mapping[tuple[CapturePoint, int], Expression],
        domain: Sequence[Sizes],
    ) -> Expressions:
        """Return the expressions that hold at sizes at which none was found."""
        left = list(_CONFIRMING)
        runs: list[tuple[Sizes, int, Shapes]] = []
        for sizes in self._fresh(knobs):
            shapes = self._runs.shapes(sizes, left[0], nodes=True)
            if shapes is not None:
                runs.append((sizes, left.pop(0), shapes))
            if not left:
                break
        if not runs:
            return {}
        known = list(dict.fromkeys(found.values()))
        possible: dict[tuple[CapturePoint, int], list[Expression]] = {}
        for point, spec in self._specs.items():
            for axis, dim in enumerate(spec.dims):
                own = found.get((point, axis))
                candidates = [own] if own else []
                if point.kind is PointKind.NODE:
                    candidates = [Expression(dim.size), *known]
                possible[point, axis] = [e for e in candidates if e.at(self._defaults) == dim.size]
        for run in runs:
            possible = self._fitting(possible, *run)
        possible = self._narrowed(possible, [sizes for sizes, _, _ in runs], self._choice(knobs))
        only = {each: _only(fitting, domain) for each, fitting in possible.items()}
        return {
            point: tuple(only[point, axis] for axis in range(len(spec.dims)))
            for point, spec in self._specs.items()
        }

    def _fitting(
        self,
        possible: Mapping[tuple[CapturePoint, int], Sequence[Expression]],
        sizes: Sizes,
        batch: int,
        shapes: Shapes,
    ) -> dict[tuple[CapturePoint, int], list[Expression]]:
        """Return the expressions of each dimension that hold in a pass."""
        fitting = {}
        for (point, axis), expressions in possible.items():
            dims, shape = self._specs[point].dims, shapes.get(point)
            real = shape[axis] if shape is not None and len(shape) == len(dims) else -1
            fitting[point, axis] = [
                each
                for each in expressions
                if replace(dims[axis], size=each.at(sizes)).at(batch) == real
            ]
        return fitting

    def _narrowed(
        self,
        possible: dict[tuple[CapturePoint, int], list[Expression]],
        used: Sequence[Sizes],
        choice: Sequence[Sizes],
    ) -> dict[tuple[CapturePoint, int], list[Expression]]:
        """Run the model where several expressions of nodes are left and differ most."""
        points = [sizes for sizes in choice if sizes not in used]
        for _ in range(_NODES):
            several = {tuple(each) for each in possible.values() if len(each) > 1}
            different = [
                (sum(len({e.at(sizes) for e in each}) - 1 for each in several), sizes)
                for sizes in points
            ]
            most, sizes = max(different, key=lambda each: each[0], default=(0, {}))
            if not most:
                break
            points.remove(sizes)
            shapes = self._runs.shapes(sizes, nodes=True)
            if shapes is not None:
                possible = self._fitting(possible, sizes, 1, shapes)
        return possible

    def _fresh(self, knobs: Sequence[_Knob]) -> Iterator[Sizes]:
        """Yield sizes that were not used, one below the default sizes and one above at first."""
        points = [sizes for sizes in self._choice(knobs) if self._is_new(sizes)]
        self._random.shuffle(points)
        used = {knob: {knob.of(sizes) for sizes, _ in self._seen} for knob in knobs}
        # The most sizes that were not used in any combination first.
        points.sort(key=lambda sizes: sum(knob.of(sizes) in used[knob] for knob in knobs))
        above = [p for p in points if any(knob.of(p) > knob.default for knob in knobs)]
        below = [p for p in points if p not in above]
        yield from [*below[:1], *above[:2], *below[1:3]]


def _measured(specs: Mapping[CapturePoint, ValueSpec]) -> Shapes:
    return {point: spec.shape(1) for point, spec in specs.items()}


def _only(expressions: Sequence[Expression], domain: Sequence[Sizes]) -> Expression | None:
    """Return the first expression if all are the same function of the sizes; None otherwise."""
    if not expressions:
        return None
    first, *others = expressions
    same = all(each.at(sizes) == first.at(sizes) for each in others for sizes in domain)
    return first if same else None
