"""Builds plans with interventions, by trying them on sample input.

Note [What interventions are tried for]
    A model need not use what a module returns. It may ignore it, because the module works in place
    on a value that the model has already, or keep another name for the same memory. Then the model
    with a copy of a value computes something else than before, or a change of the value has no
    effect. Both would be wrong answers without a word. So before any request is served, the model
    runs on sample input with a copy of each value to change, which must change nothing, and once
    more for each of the values with noise in its place, which must change some of the requested
    layers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from layertap.errors import (
    ExtractorUnsupportedError,
    InvalidInputError,
    LayertapError,
    OverloadedError,
)
from layertap.extraction.base import Values
from layertap.extraction.edited import EditedExtractor
from layertap.extraction.gradients import GradientExtractor, point_name
from layertap.extraction.interventions import REPORTS, GivenCalls, Site
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.kinds.registry import REFERENCE
from layertap.extraction.operands import ItemAxis
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.own_words import own_words
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import EditFacts, Findings, Plan, PlanKey
from layertap.extraction.points import CapturePoint, Dim, PointKind, ValueSpec
from layertap.extraction.prover import Prover
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.taps import Edit, Watch
from layertap.extraction.verify import compiled_tolerance, mismatch
from layertap.listing import listed
from layertap.models import Batch
from layertap.selection import Capture

if TYPE_CHECKING:
    from layertap.extraction.catalogue import Catalogue, LayerEntry

__all__ = ["EditPlanner"]

_log = logging.getLogger(__name__)

SET_BYTES = 256 << 20
"""Bytes that the values of one pass with several sets may take, if those of one row take less."""

MAX_ROWS = 64
"""Maximum number of rows of a pass with several sets, if the request itself has fewer items."""

_TRIED_ROWS = 3
"""Rows of the trial of several sets."""

_KEPT_VALUES = 4
"""How many of the model's largest values are expected to be in memory at once."""


class EditPlanner:
    """Builds the plans with interventions of one model.

    Args:
        context: The model, its taps and scope.
        prover: Runs the model for its plain values.
        catalogue: The model's catalogue.
        plain: Builds a plan without interventions, in steps.
    """

    def __init__(
        self,
        context: BuildContext,
        prover: Prover,
        catalogue: Catalogue,
        plain: Callable[[PlanKey], Iterator[Plan | None]],
    ) -> None:
        self._context, self._prover = context, prover
        self._catalogue, self._plain = catalogue, plain

    def steps(self, key: PlanKey) -> Iterator[Plan | None]:
        """Build a plan in steps of about one pass, on a compute thread; yield it at the end.

        Raises:
            InvalidInputError: If the model can't run on such items, or no requested layer depends
                on what an intervention changes.
            ExtractorUnsupportedError: If the model can't go on with a copy of a value.
        """
        spec = key.pass_spec
        values = yield from _last(self._plain(key._replace(pass_spec=PassSpec(spec.values))))
        base = values
        if spec.objective is not None:
            base = yield from _last(self._plain(key._replace(pass_spec=spec.without_sites)))
        known = dict(zip(values.points, values.specs, strict=True))
        trial = _Trial(self._context, self._prover, key, known)
        yield from trial.steps()
        yield self._plan(key, base, values, expands=trial.expands)

    def _plan(self, key: PlanKey, base: Plan, values: Plan, *, expands: bool) -> Plan:
        spec = key.pass_spec
        known = dict(zip(values.points, values.specs, strict=True))
        points = spec.without_sites.points
        plain = spec.objective is None
        specs = tuple(known[point] for point in points) if plain else base.specs
        site_specs = [known[site.point] for site in spec.sites]
        bytes_of_row = self._row_bytes(key, expands=expands) if spec.sets > 1 else 0
        rows = max(1, min(MAX_ROWS, SET_BYTES // max(1, bytes_of_row))) if spec.sets > 1 else 1
        extractor: EditedExtractor | GradientExtractor
        if base.gradients is not None:
            extractor = base.gradients.extractor
        else:
            extractor = EditedExtractor(
                self._context, points, specs, sets=spec.sets, expands=expands, most_rows=rows
            )
        count = max(site.intervention for site in spec.sites) + 1
        sites = Site.of(spec.sites, site_specs)
        row_bytes = 2 * sum(site.spec.bytes_per_item for site in sites)
        facts = EditFacts(extractor, sites, values, row_bytes + bytes_of_row)
        return Plan(
            REFERENCE,
            spec,
            key.batch_key,
            (*specs, *_report_specs(count)),
            extractor,
            Findings(dynamic=values.dynamic),
            gradients=base.gradients,
            edits=facts,
        )

    def _row_bytes(self, key: PlanKey, *, expands: bool) -> int:
        """Return the bytes that a row's values are expected to take at most, at once.

        If only the part of the pass behind the first changed value has the rows, it is the values
        there that count: they are much smaller than a network's first ones.
        """
        points = [site.point for site in key.pass_spec.sites]
        specs = _behind(self._catalogue, points) if expands else self._catalogue.specs.values()
        measured = max((spec.bytes_per_item for spec in specs), default=0)
        here, there = (
            sum(math.prod(item.shape) * item.dtype.itemsize for item in each.items)
            for each in (key.batch_key, self._catalogue.key)
        )
        return _KEPT_VALUES * measured * max(1, -(-here // max(1, there)))


def _behind(catalogue: Catalogue, points: Collection[CapturePoint]) -> list[ValueSpec]:
    """Return the values that may be computed from the first of some values, and that value.

    They are those of the layers that begin later than its module and outside of it, and of the
    modules around it. Where the order is not known, they are the values of all layers.
    """
    modules = [entry for entry in catalogue if entry.kind is PointKind.MODULE]
    of_points = [
        index
        for index, entry in enumerate(modules)
        if not set(points).isdisjoint(entry.points.values())
    ]
    if catalogue.varying or not of_points:
        return list(catalogue.specs.values())
    first = next(point for point in modules[min(of_points)].points.values() if point in points)
    returned = first.capture is Capture.OUTPUT and not any(
        _is_inside(point.path, first.path) for point in points
    )
    around = {path for point in points for path in _paths_to(point.path)}
    later = {
        path
        for entry in modules[min(of_points) + returned :]
        for path in _homes(entry)
        if not (returned and _is_inside(path, first.path))
    }
    known = catalogue.specs
    specs = [known[point] for point in points if point in known]
    for entry in catalogue:
        if entry.kind is PointKind.NODE and entry.name in catalogue.key.names:
            continue  # The model's input.
        homes = _homes(entry)
        # What a module around the value was given is from before.
        sides = tuple(Capture) if homes & later else (Capture.OUTPUT,) if homes & around else ()
        specs += [spec for side, spec in entry.specs.items() if side in sides]
    return specs


def _homes(entry: LayerEntry) -> set[str]:
    """Return the path of a layer's module; of a node, that of the module that computes it."""
    if entry.kind is PointKind.NODE:
        return {entry.name.rpartition(".")[0]}
    return {point.path for point in entry.points.values()}


def _is_inside(path: str, module: str) -> bool:
    return path.startswith(f"{module}.") if module else path != ""


def _paths_to(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a module, the whole model's first."""
    yield ""
    parts = path.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end])


def _last(steps: Iterator[Plan | None]) -> Generator[None, None, Plan]:
    """Pass the steps on, and return the plan."""
    for plan in steps:
        if plan is not None:
            return plan
        yield None
    raise AssertionError("the last step yields the plan")


def _report_specs(count: int) -> list[ValueSpec]:
    numbers = [ValueSpec(torch.int64, (Dim(count),)) for _ in REPORTS[:-1]]
    return [*numbers, ValueSpec(torch.float32, (Dim(count), Dim(2)))]


class _Trial:
    """The trial of one pass spec with interventions; see Note [What interventions are tried for].

    Args:
        context: The model, its taps and scope.
        prover: Runs the model for its plain values.
        key: What the plan is for.
        known: The type and shape of each value that the pass needs.

    Attributes:
        expands: Whether the first changed value may get a row for each set.
    """

    def __init__(
        self,
        context: BuildContext,
        prover: Prover,
        key: PlanKey,
        known: Mapping[CapturePoint, ValueSpec],
    ) -> None:
        self._context, self._prover, self._key = context, prover, key
        self._axes = {point: ItemAxis.of(spec) for point, spec in known.items()}
        self._spec = key.pass_spec
        self._asked = self._spec.asked
        self._sites = tuple(dict.fromkeys(site.point for site in self._spec.sites))
        self.expands = False

    def steps(self) -> Iterator[None]:
        """Try everything, in steps of about one pass."""
        x = ordinary_batch(self._context.model, 1, self._key.batch_key)
        try:
            truth = self._prover.truth(PassSpec(self._asked), x)
        except ExtractorUnsupportedError as error:
            # Some of the layers run for other input only. Then the request itself shows whether
            # its interventions change anything.
            _log.info("model %s: interventions are not tried: %s", self._name, error)
            return
        yield None
        changed = self._copies(x, truth)
        yield None
        for point in self._sites:
            if point in changed:
                self._noise(x, truth, point)
                yield None
        if self._spec.sets > 1:
            yield from self._rows(x)

    @property
    def _name(self) -> str:
        return self._context.model.name

    def _run(
        self, x: Batch, edits: Sequence[Edit], watches: Sequence[Watch] = ()
    ) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def keep(index: int, value: torch.Tensor) -> None:
            found[index] = value.clone()

        with self._context.scope as scope:
            self._context.taps.run(
                self._context.model.forward,
                x.clone(),
                self._asked,
                keep,
                to_end=not scope.rules.early_stop,
                own_threads=scope.rules.own_threads,
                edits=edits,
                watches=watches,
            )
        return [found[index] for index in range(len(self._asked))]

    def _copies(self, x: Batch, truth: Values) -> set[CapturePoint]:
        """Run with a copy of each value; return the values that there were.

        Raises:
            ExtractorUnsupportedError: If that changes a requested layer.
            InvalidInputError: If a module to skip returns another shape than it is given.
        """
        changed: set[CapturePoint] = set()
        skips = {site.point for site in self._spec.sites if site.skips}
        calls = GivenCalls()

        def copy(point: CapturePoint, value: torch.Tensor) -> torch.Tensor:
            changed.add(point)
            if point in skips:
                calls.check(point, value)
            return value.clone()

        edits = [Edit(point, partial(copy, point)) for point in self._sites]
        watches = [watch for path in {point.path for point in skips} for watch in calls.watch(path)]
        try:
            found = self._run(x, edits, watches)
        except LayertapError:
            raise
        except Exception as error:
            raise self._refused(own_words(error)) from error
        for point, value, expected in zip(self._asked, found, truth, strict=True):
            fault = mismatch(value, expected, compiled_tolerance(expected))
            if fault:
                raise self._refused(
                    f"the model changes values in place in a way that a copy of them does not "
                    f"show: of {point_name(point)!r}, {fault}"
                )
        return changed

    def _refused(self, reason: str) -> ExtractorUnsupportedError:
        sites = listed(repr(point_name(point)) for point in self._sites)
        return ExtractorUnsupportedError(
            f"interventions on {sites} of model {self._name!r}: the model can't go on with a copy "
            f"of a value there: {reason}"
        )

    def _noise(self, x: Batch, truth: Values, point: CapturePoint) -> None:
        """Refuse an intervention if noise in its value changes nothing that is requested."""
        for scale in (1.0, 100.0):
            try:
                found = self._run(x, [Edit(point, partial(_noisy, scale, 0))])
            except Exception as error:
                if is_out_of_memory(error) or isinstance(error, OverloadedError):
                    raise self._prover.out_of_memory(x) from error
                return
            if any(
                one.shape != other.shape or not torch.equal(one, other)
                for one, other in zip(found, truth, strict=True)
            ):
                return
        asked = listed(repr(point_name(each)) for each in self._asked)
        raise InvalidInputError(
            f"interventions: no requested layer ({asked}) depends on {point_name(point)!r}; "
            f"request a layer behind it"
        )

    def _rows(self, x: Batch) -> Iterator[None]:
        """Find out whether the first changed value may get a row for each set."""
        try:
            separate = []
            for row in range(_TRIED_ROWS):
                edits = [Edit(point, partial(_noisy, 1.0, row)) for point in self._sites]
                separate.append(self._run(x, edits))
                yield None
            edits = [Edit(point, partial(_in_rows, self._axes[point])) for point in self._sites]
            together = self._run(x, edits)
        except Exception as error:
            if is_out_of_memory(error):
                raise self._prover.out_of_memory(x) from error
            _log.info("model %s takes no rows at %s: %s", self._name, self._sites, error)
            return
        self.expands = all(
            _same_rows(value, rows, self._axes[point])
            for point, value, rows in zip(
                self._asked, together, zip(*separate, strict=True), strict=True
            )
        )


def _noisy(scale: float, row: int, value: torch.Tensor) -> torch.Tensor:
    """Return the value with noise of its own magnitude added."""
    generator = torch.Generator().manual_seed(7 + row)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
    largest = torch.nan_to_num(value.detach().abs()).amax() if value.numel() else 1.0
    spread = float(largest) or 1.0
    return value + noise.to(value.device, value.dtype) * (scale * spread)


def _in_rows(axis: ItemAxis, value: torch.Tensor) -> torch.Tensor:
    """Return the value with a row for each of the trial's changes."""
    if axis.axis is None:
        raise ValueError("the value has no batch dimension that is known")
    rows = value.split(axis.per_item, axis.axis)
    if len(rows) == 1:
        rows = rows * _TRIED_ROWS
    return torch.cat([_noisy(1.0, row, part) for row, part in enumerate(rows)], axis.axis)


def _same_rows(value: torch.Tensor, rows: Sequence[torch.Tensor], axis: ItemAxis) -> bool:
    if axis.axis is None:
        return False
    expected = torch.cat(list(rows), axis.axis)
    if value.shape != expected.shape:
        # What does not depend on a changed value has a single row.
        if value.shape != rows[0].shape or any(not torch.equal(row, rows[0]) for row in rows[1:]):
            return False
        expected = rows[0]
    return not mismatch(value, expected, compiled_tolerance(expected))
