"""Applies the interventions of a request to the values of a pass.

Note [Which value changes]
    The model goes on with a copy of the value in which the selected part is changed. What others
    hold of the value, such as a residual connection from before the module or the input that
    ``nn.Identity`` returned, stays as it was. Captures and gradients of the same value are those of
    the changed copy.

Note [Rows]
    The passes of one request need not have its items as they came. A pass may have one of them, or
    all of them several times, one block after the other: for the steps of integrated gradients, or
    for each set of interventions. ``PassRows`` says what is where, so that an intervention finds
    the rows of its items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from layertap.errors import ExtractorUnsupportedError, InvalidInputError, ModelRunError
from layertap.extraction.containers import pick
from layertap.extraction.operands import ItemAxis
from layertap.extraction.operations import Change, computed, operand_of
from layertap.extraction.pass_spec import SiteSpec
from layertap.extraction.points import CapturePoint, Sink, ValueSpec
from layertap.extraction.regions import NamedAxes, Region, selected
from layertap.extraction.taps import Edit, Watch
from layertap.intervention import Intervention, Operation
from layertap.selection import Capture

__all__ = ["REPORTS", "Changes", "GivenCalls", "PassRows", "Site", "Tally"]

REPORTS = ("calls", "elements", "changed", "norm")
"""What the reply reports about each intervention; the names begin with ``interventions.``."""


@dataclass(frozen=True, slots=True)
class Site:
    """A value that interventions change.

    Attributes:
        point: The value.
        spec: Its dtype and shape.
        interventions: The indices of the interventions, in the order in which they are applied.
    """

    point: CapturePoint
    spec: ValueSpec
    interventions: tuple[int, ...]

    @classmethod
    def of(cls, sites: Sequence[SiteSpec], specs: Sequence[ValueSpec]) -> tuple[Site, ...]:
        """Return the distinct values, given the spec of each site's value."""
        found: dict[CapturePoint, list[int]] = {}
        for site in sites:
            found.setdefault(site.point, []).append(site.intervention)
        known = {site.point: spec for site, spec in zip(sites, specs, strict=True)}
        return tuple(cls(point, known[point], tuple(each)) for point, each in found.items())


@dataclass(frozen=True, slots=True)
class PassRows:
    """Which items a pass has; see Note [Rows].

    Attributes:
        items: The request's items in each block.
        size: The number of items of the request.
        blocks: The set of interventions of each block; 1 without sets.
    """

    items: Sequence[int]
    size: int
    blocks: Sequence[int] = (1,)

    @classmethod
    def whole(cls, size: int, times: int = 1) -> PassRows:
        """Return the rows of a pass that has the whole batch, several times."""
        return cls(range(size), size, (1,) * times)

    @property
    def count(self) -> int:
        """The number of rows of the pass."""
        return len(self.items) * len(self.blocks)


class Tally:
    """Counts what the interventions of a request changed, over all of its passes.

    Args:
        count: The number of interventions.
    """

    def __init__(self, count: int) -> None:
        self.calls = [0] * count
        self._now = [0] * count
        self._elements = [0] * count
        self._changed: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(count)]

    def end_pass(self) -> None:
        """Note that a pass has ended: the calls of a request are those of its longest pass."""
        self.calls = list(map(max, self.calls, self._now))
        self._now = [0] * len(self._now)

    def add(self, index: int, old: torch.Tensor, new: torch.Tensor) -> None:
        """Count a change.

        Args:
            index: The index of the intervention.
            old: The selected part before.
            new: The selected part afterwards.
        """
        old, new = old.detach(), new.detach()
        self._now[index] += 1
        self._elements[index] += old.numel()
        both_nan = (new != new) & (old != old)  # noqa: PLR0124 - that is what NaN is
        self._changed[index].append(((new != old) & ~both_nan).sum())
        wide = torch.promote_types(old.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(each, dtype=wide) for each in (old, new)]
        self._norms[index].append(torch.stack(norms))

    def report(self, sink: Sink, first: int) -> None:
        """Capture the reports, whose points begin at an index; see ``REPORTS``."""
        device = next(each[0].device for each in self._norms if each)
        norms = [_together(each) for each in self._norms]
        changed = [int(sum(each)) for each in self._changed]
        for place, counts in enumerate((self.calls, self._elements, changed)):
            sink(first + place, torch.tensor(counts, device=device))
        sink(first + 3, torch.tensor(norms, dtype=torch.float32, device=device))


def _together(norms: Sequence[torch.Tensor]) -> list[float]:
    found = np.asarray([each.cpu().double().numpy() for each in norms])
    return [float(np.hypot.reduce(found[:, side])) for side in (0, 1)]


@dataclass(frozen=True, eq=False)
class Changes:
    """The interventions of a request, and the values that they change.

    Attributes:
        interventions: The interventions.
        sites: The values.
    """

    interventions: tuple[Intervention, ...]
    sites: tuple[Site, ...]
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tally", Tally(len(self.interventions)))

    @property
    def mix_items(self) -> bool:
        """Whether what an item becomes depends on other items of the batch."""
        return any(one.mixes_items for one in self.interventions)

    def again(self) -> Changes:
        """Return the same changes with nothing counted, for running the request again."""
        return Changes(self.interventions, self.sites)

    def check(self, size: int) -> None:
        """Check the interventions against the values that they change, as far as these are known.

        Args:
            size: The number of items of the request.

        Raises:
            InvalidInputError: If an axis, an index or a tensor doesn't fit.
        """
        for one in self.interventions:
            if one.operation is Operation.PATCH and one.source_item >= size:
                raise InvalidInputError(
                    f"intervention {one.name}: source_item: got {one.source_item}, expected from 0 "
                    f"to {size - 1}, as the batch has {size} items"
                )
        for site in self.sites:
            axis = ItemAxis.of(site.spec)
            if axis.axis is None and size > 1:
                raise InvalidInputError(
                    f"interventions: the value of layer {site.point.path!r} has no batch "
                    f"dimension that is known, so it can be changed for one item per request"
                )
            if site.spec.dynamic:
                continue
            for index in site.interventions:
                one = self.interventions[index]
                shape = axis.shape_per_item(site.spec)
                found = selected(one, NamedAxes.of(site.spec), shape, size)
                operand_of(one, found)
                found.over(one)

    def edits(
        self, rows: PassRows, *, count: bool = True, expand: bool = False
    ) -> tuple[list[Edit], list[Watch]]:
        """Return the edits of a pass, and what it must watch for them.

        Args:
            rows: The rows of the pass.
            count: Whether they count in the report.
            expand: Whether the pass begins with the rows of one block, and the first value that is
                changed gets those of all blocks.
        """
        edits, watches = [], []
        for site in self.sites:
            change = _Change(self, site, rows, count=count, expand=expand)
            edits.append(Edit(site.point, change))
            operations = {self.interventions[index].operation for index in site.interventions}
            if Operation.SKIP in operations:
                watches.extend(change.given.watch(site.point.path))
        return edits, watches

    def finish(self, sink: Sink, first: int) -> None:
        """Capture the reports; see ``Tally.report``.

        Raises:
            ModelRunError: If an intervention changed nothing.
        """
        for one, calls in zip(self.interventions, self.tally.calls, strict=True):
            if not calls:
                raise InvalidInputError(
                    f"intervention {one.name}: it changed nothing, as the layer did not run on "
                    f"this input before the last of the requested layers"
                )
        self.tally.report(sink, first)


class GivenCalls:
    """What calls of a module were given, for those that are skipped.

    A module may call itself, so it is the call that began last that ends first.
    """

    def __init__(self) -> None:
        self._running: list[torch.Tensor | None] = []
        self._ended: torch.Tensor | None = None

    def watch(self, path: str) -> list[Watch]:
        """Return what a pass must watch."""
        begin = Watch(path, Capture.INPUT, self._begin)
        return [begin, Watch(path, Capture.OUTPUT, self._end)]

    def check(self, point: CapturePoint, returned: torch.Tensor) -> torch.Tensor:
        """Return what the call that has just ended was given.

        Raises:
            InvalidInputError: If that has another shape than a value that it returned.
        """
        given = self._ended
        if given is None or given.shape != returned.shape or given.dtype != returned.dtype:
            what = "no tensor first" if given is None else f"{given.dtype} {list(given.shape)}"
            raise InvalidInputError(
                f"intervention SKIP of layer {point.path!r}: the module was given {what} and "
                f"returned {returned.dtype} {list(returned.shape)}, expected one shape for both"
            )
        return given

    def _begin(self, value: object) -> None:
        tensor = pick(value, () if isinstance(value, torch.Tensor) else ("0",))
        # A copy, which the module can't change in place.
        self._running.append(None if tensor is None else tensor.clone())

    def _end(self, value: object) -> None:
        self._ended = self._running.pop()


class _Change:
    """Changes one value of one pass.

    Args:
        changes: The interventions.
        site: The value.
        rows: The rows of the pass.
        count: Whether the changes count.
        expand: Whether the value may have the rows of one block only.
    """

    def __init__(
        self, changes: Changes, site: Site, rows: PassRows, *, count: bool, expand: bool
    ) -> None:
        self._changes, self._site, self._rows = changes, site, rows
        self._count, self._expand = count, expand
        self._axis = ItemAxis.of(site.spec)
        self._axes = NamedAxes.of(site.spec)
        self.given = GivenCalls()

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Return the changed value.

        Raises:
            InvalidInputError: If it holds no floating-point numbers on this input.
        """
        if not value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            raise InvalidInputError(
                f"interventions: the value of layer {self._site.point.path!r} is {dtype} on this "
                f"input, and only floating-point values can be changed"
            )
        items = self._items(value)
        for index in self._site.interventions:
            self._apply(index, value, items)
        shape = list(value.shape)
        if self._axis.axis is not None:
            shape[self._axis.axis] = self._axis.per_item * len(items)
        return self._axis.joined(items, shape)

    def _rows_of(self, value: torch.Tensor) -> int:
        return 1 if self._axis.axis is None else value.shape[self._axis.axis] // self._axis.per_item

    def _items(self, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of the value as ``[rows, ...]``."""
        found, blocks = self._rows_of(value), len(self._rows.blocks)
        if self._expand and blocks > 1 and found == len(self._rows.items):
            return self._axis.items(
                torch.cat([value] * blocks, self._axis.axis or 0), found * blocks
            )
        if found != self._rows.count:
            raise ModelRunError(
                f"layer {self._site.point.path!r}: got {found} items, expected {self._rows.count}"
            )
        return self._axis.items(value.clone(), found)

    def _apply(self, index: int, value: torch.Tensor, items: torch.Tensor) -> None:
        """Apply one intervention to a copy of the value, in place."""
        one, rows = self._changes.interventions[index], self._rows
        found = selected(one, self._axes, items.shape[1:], rows.size)
        here = {item: place for place, item in enumerate(rows.items)}
        mine = [number for number, item in enumerate(found.items) if item in here]
        blocks = [block for block, of in enumerate(rows.blocks) if one.set in (0, of)]
        if not mine or not blocks:
            return
        each = len(rows.items)
        places = [here[found.items[number]] for number in mine]
        picked = [block * each + place for block in blocks for place in places]
        region = Region(picked, found.dims, items.shape, items.device)
        # A copy where autograd may keep it, as the next lines change the items in place.
        old = region.read(items)
        old = old.clone() if torch.is_grad_enabled() else old
        match one.operation:
            case Operation.PATCH:
                if one.source_item not in here:
                    raise ExtractorUnsupportedError(
                        f"intervention {one.name}: the items of a batch influence each other in "
                        f"this model, so gradients are computed for each item alone, where "
                        f"there is no other item to patch from"
                    )
                source = [block * each + here[one.source_item] for block in blocks for _ in places]
                new = Region(source, found.dims, items.shape, items.device).read(items).clone()
            case Operation.SKIP:
                new = region.read(self._skipped(value))
            case _:
                operand = operand_of(one, found)
                if operand is not None and operand.shape[0] > 1:
                    operand = operand[mine].repeat(len(blocks), *(1,) * (operand.dim() - 1))
                new = computed(Change(one, found, old, operand, len(blocks)))
        new = new.to(items.dtype).expand_as(old)
        if self._count:
            self._changes.tally.add(index, old, new)
        region.write(items, new)

    def _skipped(self, value: torch.Tensor) -> torch.Tensor:
        """Return what the module was given, as ``[rows, ...]``."""
        return self._items(self.given.check(self._site.point, value))
