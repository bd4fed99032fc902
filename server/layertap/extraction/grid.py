"""Finds by experiment which dimensions of an activation follow the input's.

Note [Two experiments]
    *Another size.* The model runs once more with another height and width, in another ratio. A
    dimension that grew by the same factor as the height is the height. One that grew by the factor
    of height times width, apart from some tokens in front, holds the grid row by row. One that
    stayed the same is channels, or heads.

    *Another place.* Many transformers take one size only, and adaptive pooling gives one size for
    every input. For these, a small block of the input is changed, in each of three places, and we
    look where the activation changes most. If that position along a dimension matches the block's
    for all three places, the dimension belongs to the grid. After attention, or a mixing layer
    without a residual connection, every element changes and this shows nothing. But if some layers
    showed that a size is a grid's, and none showed that it is channels, it is taken as the grid's
    in the model's other layers too.

    What neither experiment shows stays unknown. Sizes alone prove nothing: 256 channels need not
    be a 16 × 16 grid.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.survey import Shapes, survey_shapes, survey_values
from layertap.models import Batch, IdRange, LoadedModel

__all__ = ["Grids", "other_items", "survey_grids"]

_log = logging.getLogger(__name__)

MAX_TOKENS_IN_FRONT = 8
"""Class, distillation and register tokens. DINOv2 has most: one class token, four registers."""

_STEPS = (32, 28, 48)
"""Pixels by which an image is made lower and wider: multiples of usual strides and patch sizes."""

_PLACES = ((0.15, 0.6), (0.5, 0.2), (0.85, 0.9))
"""Where a block is changed, as shares of the image's height and width."""

_BLOCK = 112
"""A block's height and width are the image's divided by this, and at least two pixels.

That is smaller than a patch. With two pixels, a model that skips every other pixel sees the change.
"""

Moves = Mapping[CapturePoint, Sequence[Sequence[int]]]
"""For each place of a block: the position of the largest change along each dimension of an item."""


@dataclass
class Grids:
    """What the experiments showed about one model.

    Attributes:
        specs: The dtype and shape of each point.
        item: The shape of the first input's item at which these were measured.
        other: The other item shape that was tried; equal to ``item`` if none could be tried.
        shapes: The shape of each point for a batch of one such item, as far as the model ran.
        moves: ``Moves`` of each point whose shape showed nothing.
    """

    specs: Mapping[CapturePoint, ValueSpec]
    item: tuple[int, ...]
    other: tuple[int, ...]
    shapes: Shapes
    moves: Moves = field(default_factory=dict)

    def geometries(self) -> dict[CapturePoint, Geometry]:
        """Return the geometry of each point for which anything is known."""
        found = {point: self._of(point) for point in self.specs}
        known = {point: geometry for point, geometry in found.items() if geometry}
        rows = {
            (g.front + g.height * g.width, g.channels): g
            for g in known.values()
            if g.layout is Layout.TOKENS
        }
        maps = {(g.height, g.width) for g in known.values() if g.layout is not Layout.UNKNOWN}
        for point in self.specs.keys() - known.keys() - self.shapes.keys():
            if alike := _alike(_item_sizes(self.specs[point]), rows, maps):
                known[point] = alike
        return known

    def _of(self, point: CapturePoint) -> Geometry | None:
        return self.by_size(point) or self.by_place(point) or self._pooled(point)

    def _pooled(self, point: CapturePoint) -> Geometry | None:
        """Return the geometry of a feature map pooled to one position; None if it isn't one."""
        sizes = _item_sizes(self.specs[point])
        if len(sizes) == len(self.item) == 3 and 1 < max(sizes) == math.prod(sizes):
            if sizes[0] > 1:
                return _map(Layout.CHANNELS_FIRST, sizes)
            if sizes[2] > 1:
                return _map(Layout.CHANNELS_LAST, sizes)
        return None

    def by_size(self, point: CapturePoint) -> Geometry | None:
        """Return the geometry that another size of the input shows; None if it shows none."""
        sizes, others = _item_sizes(self.specs[point]), self._others(point)
        if others is None or len(others) != len(sizes):
            return None
        follows = [axis for axis, size in enumerate(sizes) if others[axis] != size]
        if not follows or len(follows) == len(sizes):
            return None
        if len(self.item) < 3:
            changed = sum(map(int.__ne__, self.item, self.other))
            more = len(follows) > changed  # Such as an attention map, with two axes of positions.
            return None if more else Geometry(positions=tuple(axis + 1 for axis in follows))
        if len(sizes) == len(self.item):
            for layout, height, width in ((Layout.CHANNELS_FIRST, -2, -1),
                                          (Layout.CHANNELS_LAST, -3, -2)):  # fmt: skip
                axes = [len(sizes) + height, len(sizes) + width]
                if follows == axes and self._scales(sizes, others, axes):
                    return _map(layout, sizes)
        if len(sizes) == 2 and len(follows) == 1:
            return self._tokens(sizes, others, follows[0])
        return None

    def by_place(self, point: CapturePoint) -> Geometry | None:
        """Return the geometry that the places of the largest changes show; None if none."""
        moves, sizes = self.moves.get(point), _item_sizes(self.specs[point])
        if moves is None:
            return None
        if len(self.item) < 3:
            return self._series(moves, sizes)
        if len(sizes) == len(self.item):
            for layout, height, width in ((Layout.CHANNELS_FIRST, -2, -1),
                                          (Layout.CHANNELS_LAST, -3, -2)):  # fmt: skip
                if _moves_along(moves, sizes, height, width):
                    return _map(layout, sizes)
        if len(sizes) == 2 and len(self.item) == 3:
            for axis in (0, 1):
                for front, h, w in _grids(sizes[axis], self.item[-2:]):
                    seen = [move[axis] for move in moves]
                    if seen == [front + _cell(y, h) * w + _cell(x, w) for y, x in _PLACES]:
                        return _row(axis, sizes, front, h, w)
        return None

    def _others(self, point: CapturePoint) -> tuple[int, ...] | None:
        shape, axis = self.shapes.get(point), self.specs[point].batch_axis
        if shape is None or axis is None:
            return None
        return shape[: axis[0]] + shape[axis[0] + 1 :]

    def _scales(self, sizes: Sequence[int], others: Sequence[int], axes: Sequence[int]) -> bool:
        """Return whether an activation's height and width grew in proportion to the input's."""
        return all(
            abs(sizes[axis] * self.other[side] / self.item[side] - others[axis]) < 1.5
            for axis, side in zip(axes, (-2, -1), strict=True)
        )

    def _tokens(self, sizes: Sequence[int], others: Sequence[int], axis: int) -> Geometry:
        # Images only: a video's tokens are those of all its frames, one frame after the other.
        image = self.item[-2:] if len(self.item) == 3 else ()
        for front, height, width in _grids(sizes[axis], image):
            for other in _grids(others[axis], self.other[-2:], [front]):
                if self._scales((height, width), other[1:], (0, 1)):
                    return _row(axis, sizes, front, height, width)
        return Geometry(positions=(axis + 1,))

    def _series(self, moves: Sequence[Sequence[int]], sizes: Sequence[int]) -> Geometry | None:
        length = self.item[-1]
        for axis, size in enumerate(sizes):
            front = size - length
            seen = [move[axis] for move in moves]
            near = 0 <= front <= MAX_TOKENS_IN_FRONT and len(sizes) > 1
            if near and seen == [front + _cell(x, length) for _, x in _PLACES]:
                return Geometry(positions=(axis + 1,))
        return None


def survey_grids(
    model: LoadedModel,
    specs: Mapping[CapturePoint, ValueSpec],
    turn: AbstractContextManager[object],
    others: Callable[[Batch], Shapes],
) -> dict[CapturePoint, Geometry]:
    """Find the geometry of each point; see Note [Two experiments].

    Args:
        model: The model; no other forward pass of it may run meanwhile.
        specs: The dtype and shape of each point, for the model's default items.
        turn: The context to hold during each pass.
        others: Returns the shapes, for a batch, of the points that belong to no module.
    """
    item = model.signature.main.shape
    specs = {p: spec for p, spec in specs.items() if _is_plain(spec)}
    best: tuple[tuple[int, ...], Shapes] = (item, {})
    for other in other_items(item, model.signature.main.free):
        x = ordinary_batch(model, 1, model.signature.resized(other))
        shapes, ended = survey_shapes(model, x, turn)
        if ended:
            best = other, {**shapes, **_of_nodes(others, x)}
            break
        if len(shapes) > len(best[1]):
            best = other, shapes
    grids = Grids(specs, item, *best)
    # Skip points that the other size explained, and those with only one dimension above 1.
    open_points = {p for p in specs if _is_open(specs[p]) and not grids.by_size(p)}
    if open_points:
        grids.moves = _survey_moves(model, {p: specs[p] for p in open_points}, turn)
    return grids.geometries()


def other_items(item: tuple[int, ...], free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield item shapes to try, to see which dimensions of a value follow the height or width.

    An image's height and width change in different ratios, so that they can be told apart. This is
    tried even if a model is said to take one size only, as it may run far enough.
    """
    if len(item) >= 3:
        *rest, height, width = item
        if min(height, width) > 3 * max(_STEPS):
            for step in _STEPS:
                yield (*rest, height - step, width + step)
        else:
            yield (*rest, 2 * height, 3 * width)
        return
    if not item:
        return
    axes = free or [len(item) - 1]
    for twice, half in ((2, 1), (1, 2)):
        other = tuple(
            size * twice // half if axis in axes else size for axis, size in enumerate(item)
        )
        if min(other) > 0:
            yield other


def _of_nodes(others: Callable[[Batch], Shapes], x: Batch) -> Shapes:
    try:
        return others(x)
    except Exception as error:  # noqa: BLE001 - a symbolic graph may hold the sizes of its example
        _log.debug("the symbolic graph does not run on %s: %s", x.key, error)
        return {}


def _survey_moves(
    model: LoadedModel,
    specs: Mapping[CapturePoint, ValueSpec],
    turn: AbstractContextManager[object],
) -> dict[CapturePoint, list[list[int]]]:
    """Return for each point where it changes most when each place of the input changes."""
    moves: dict[CapturePoint, list[list[int]]] = {point: [] for point in specs}
    if len(model.signature.main.shape) == 2:
        return {}  # Nothing tells which of the two dimensions is time.

    def see(point: CapturePoint, tensor: torch.Tensor) -> None:
        if point in specs and (where := _largest_change(tensor, specs[point])):
            moves[point].append(where)

    for place in _PLACES:
        try:
            survey_values(model, _changed_at(model, place), turn, see)
        except Exception as error:  # noqa: BLE001 - a model may refuse the changed block
            _log.debug("model %s does not run on a changed input: %s", model.name, error)
    return {point: seen for point, seen in moves.items() if len(seen) == len(_PLACES)}


def _changed_at(model: LoadedModel, place: tuple[float, float]) -> Batch:
    """Return a batch of two items that differ only in one block of the second item."""
    one, main = ordinary_batch(model, 1), model.signature.main
    batch = one.map(lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)))
    block = batch[main.name][1]
    sides = main.shape[-2:] if len(main.shape) > 2 else main.shape[-1:]
    for share, size, axis in zip(place[-len(sides) :], sides, range(-len(sides), 0), strict=True):
        begin = int(share * size)
        least = 2 if len(sides) == 2 else 1
        block = block.narrow(axis, begin, min(size - begin, max(least, size // _BLOCK)))
    if main.dtype.is_floating_point:
        block.add_(3)
    else:
        rows = main.values.rows if isinstance(main.values, IdRange) else 2
        block.add_(max(1, rows // 2)).remainder_(rows)
    return batch


def _largest_change(tensor: torch.Tensor, spec: ValueSpec) -> list[int]:
    """Return where two items differ most along each dimension; empty if nothing can be said."""
    axis = spec.batch_axis
    if axis is None or tensor.ndim != len(spec.dims) or tensor.shape[axis[0]] != 2:
        return []
    first, second = tensor.unbind(axis[0])
    # Not in double precision: of a large value, that takes ten times as long. The difference of two
    # floats that are close to each other is exact, and torch adds in cascades.
    precision = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    sums = _sums_along((second.to(precision) - first.to(precision)).abs_())
    if not sums[0].isfinite().all() or not sums[0].any():
        return []
    return [int(each.argmax()) for each in sums]


def _sums_along(change: torch.Tensor) -> list[torch.Tensor]:
    """Return for each dimension the sums over all others."""
    sums = []
    while change.ndim > 1:
        sums.append(change.sum(tuple(range(change.ndim - 1))))
        change = change.sum(-1)
    return [change, *reversed(sums)]


def _is_plain(spec: ValueSpec) -> bool:
    """Return whether a value has one element of its batch axis per item, and two more axes."""
    axis = spec.batch_axis
    return not spec.dynamic and axis is not None and axis[1] == 1 and len(spec.dims) > 2


def _is_open(spec: ValueSpec) -> bool:
    return spec.dtype.is_floating_point and sum(size > 1 for size in _item_sizes(spec)) > 1


def _item_sizes(spec: ValueSpec) -> tuple[int, ...]:
    return tuple(dim.size for dim in spec.dims if not dim.batch)


def _map(layout: Layout, sizes: Sequence[int]) -> Geometry:
    if layout is Layout.CHANNELS_FIRST:
        return Geometry(layout, sizes[0], sizes[-2], sizes[-1])
    return Geometry(layout, sizes[-1], sizes[-3], sizes[-2])


def _row(axis: int, sizes: Sequence[int], front: int, height: int, width: int) -> Geometry:
    """Return the geometry of a grid flattened into one axis: ``[tokens, C]`` or ``[C, tokens]``."""
    if axis == 0:
        return Geometry(Layout.TOKENS, sizes[1], height, width, front)
    return Geometry(positions=(2,))


def _alike(
    sizes: tuple[int, ...],
    rows: Mapping[tuple[int, int], Geometry],
    maps: set[tuple[int, int]],
) -> Geometry | None:
    """Return the geometry of other layers of the model with the same sizes; None if none is known.

    Args:
        sizes: The sizes of one item.
        rows: The known geometries of tokens, by (number of tokens, channels).
        maps: The known pairs of height and width.
    """
    if len(sizes) == 2:
        tokens, turned = rows.get((sizes[0], sizes[1])), rows.get((sizes[1], sizes[0]))
        if tokens:
            return tokens
        return Geometry(positions=(2,)) if turned else None
    if len(sizes) == 3:
        first, last = sizes[1:] in maps, sizes[:2] in maps
        if first != last:
            return _map(Layout.CHANNELS_FIRST if first else Layout.CHANNELS_LAST, sizes)
    return None


def _cell(share: float, cells: int) -> int:
    return min(cells - 1, int(share * cells))


def _moves_along(
    moves: Sequence[Sequence[int]], sizes: Sequence[int], height: int, width: int
) -> bool:
    """Return whether the largest change is where the block is, or one cell next to it."""
    h, w = sizes[height], sizes[width]
    if h < 2 or w < 2:
        return False
    rows = [move[height] - _cell(y, h) for move, (y, _) in zip(moves, _PLACES, strict=True)]
    columns = [move[width] - _cell(x, w) for move, (_, x) in zip(moves, _PLACES, strict=True)]
    beside = 0 if min(h, w) < 4 else 1
    return max(map(abs, rows + columns)) <= beside


def _grids(
    tokens: int, image: Sequence[int], fronts: Sequence[int] | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yield (tokens in front, height, width) of every grid that this number of tokens may be.

    The grid's cells are square in the image, up to rounding.
    """
    if not image:
        return
    for front in fronts if fronts is not None else range(MAX_TOKENS_IN_FRONT + 1):
        cells = tokens - front
        for height in range(1, cells + 1):
            width, rest = divmod(cells, height)
            if (
                not rest
                and abs(image[1] * height / image[0] - width) < 1
                and (abs(image[0] * width / image[1] - height) < 1)
            ):
                yield front, height, width
