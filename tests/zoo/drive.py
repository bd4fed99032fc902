"""Serving a specimen in every way that its catalogue claims; each answer is held to the truth."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch

from asking import ask
from layertap import Extractor, Features
from layertap.batching import ALONE, BatchPolicy
from layertap.batching.queue import BatchQueue
from layertap.engine import Engine, HostOptions, ModelHost, compute
from layertap.errors import ExtractorUnsupportedError, InvalidInputError, LayertapError
from layertap.extraction import PointKind
from layertap.models import ModelSpec
from layertap.selection import Capture, LayerSelection
from quick import QUICK
from zoo.specimen import Specimen
from zoo.truth import Point, Truth, mistake, truth_of

__all__ = ["FULL", "SHORT", "Cell", "Grid", "Report", "Way", "drive"]

CALLERS = 8
ASKED = (Extractor.AUTO, *QUICK)
IN_A_ROW = 3
TOLERANT = (Extractor.TORCHSCRIPT, Extractor.AUTO)


@dataclass(frozen=True)
class Way:
    """One way of serving.

    Attributes:
        name: What the table calls it.
        instances: Forward passes that may run at once; 1 is latency mode.
        shared: Whether requests may share passes.
        declared: How many layers are declared when the model is loaded.
        callers: The extractors that eight callers ask at once as well.
        one_thread: Whether one of the threads alone loads the model and serves the requests that
            come one after the other, so that each finds what was left in that thread before it.
    """

    name: str
    instances: int = 1
    shared: bool = False
    declared: int = 0
    callers: tuple[Extractor, ...] = ASKED
    one_thread: bool = False


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Attributes:
        ways: Ways of serving.
        singles: The extractors that are asked for each layer by itself too.
        spread: Whether the eight callers share the layers to ask for by themselves; else each of
            them asks for every layer.
        promotes: Whether AUTO is asked until a plan was compiled beside the requests.
        extractors: Those that are asked.
        most: Layers that one request asks for at most; several requests ask for more of them.
        compiled: Layers, spread over the model, that the requests for TORCHSCRIPT and AUTO ask for.
    """

    ways: tuple[Way, ...]
    singles: tuple[Extractor, ...]
    spread: bool = False
    promotes: bool = False
    extractors: tuple[Extractor, ...] = ASKED
    most: int = 400
    compiled: int = 400


SHORT = Grid(
    (Way("throughput", instances=4, callers=(Extractor.HOOK, Extractor.AUTO), one_thread=True),),
    singles=(Extractor.HOOK,),
    spread=True,
)
"""Loading costs much, so requests in one thread and at once are tried on one loaded model."""

FULL = Grid(
    (
        Way("latency"),
        Way("latency, declared", declared=6),
        Way("throughput", instances=4),
        Way("throughput, declared", instances=4, declared=6),
        Way("shared passes", shared=True, declared=6),
        Way("shared passes, throughput", instances=4, shared=True),
    ),
    singles=ASKED,
    promotes=True,
)


@dataclass(frozen=True)
class Layer:
    """One side of one layer of a catalogue."""

    name: str
    capture: Capture
    point: Point

    @property
    def text(self) -> str:
        """What the table calls it."""
        return self.name if self.capture is Capture.OUTPUT else f"{self.name}:{self.capture}"

    @property
    def selection(self) -> LayerSelection:
        """What is asked for; the alias finds it in the reply whatever its name has in it."""
        return LayerSelection(self.name, capture=self.capture, alias=self.text)


@dataclass
class Cell:
    """What became of one layer by one extractor.

    Attributes:
        answers: Answers that were right.
        wrong: How answers were wrong.
        late: Refusals that came only with a request, though the catalogue claimed the layer.
        failed: Other errors, for inputs on which the model itself does not fail.
    """

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What became of a specimen.

    Attributes:
        specimen: Its name.
        cells: For each extractor and layer that it claims.
        layers: Layers that run, one of whose sides is a tensor or refused.
        refused: For each extractor the layers that the catalogue refuses.
        unloadable: Why the model was refused when it was loaded; empty where it was not.
        outputs: Layers whose output HOOK serves.
        notes: What the catalogue says of the model in words.
        door: Why requests were refused at the door, by what the catalogue says of the input.
        chance: Layers whose values follow chance, of which no answer can be held against another.
    """

    specimen: str
    cells: dict[tuple[Extractor, str], Cell] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)
    refused: dict[Extractor, set[str]] = field(default_factory=dict)
    unloadable: str = ""
    outputs: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    door: set[str] = field(default_factory=set)
    chance: set[str] = field(default_factory=set)

    @property
    def stateful(self) -> bool:
        """Whether the catalogue says that an answer may depend on earlier requests."""
        return any("may depend on earlier requests" in note for note in self.notes)

    def cell(self, extractor: Extractor, layer: str) -> Cell:
        """Return the cell, a new one where there is none."""
        return self.cells.setdefault((extractor, layer), Cell())

    def faults(self, kind: str) -> list[str]:
        """Return one line for each cell that has faults of a kind: "wrong", "late", "failed"."""
        return [
            f"{extractor.name} {layer}: {getattr(cell, kind)[0]} ({len(getattr(cell, kind))}×)"
            for (extractor, layer), cell in self.cells.items()
            if getattr(cell, kind)
        ]


OTHER_SEEDS = range(1, 6)
"""Several, because values that chance only rounds otherwise are often equal for two seeds."""


class Truths:
    """The truth about each request of a specimen, found when it is first needed."""

    def __init__(self, specimen: Specimen, device: str) -> None:
        self._specimen = specimen
        self._device = device

    @cached_property
    def all(self) -> list[Truth]:
        """One for each request."""
        return self._with(seed=0)

    @cached_property
    def others(self) -> list[list[Truth]]:
        """The same with each of ``OTHER_SEEDS``, where the specimen draws random numbers."""
        if not self._specimen.draws:
            return []
        return [self._with(seed) for seed in OTHER_SEEDS]

    def _with(self, seed: int) -> list[Truth]:
        return [
            truth_of(self._specimen.fresh(), x, seed, self._device) for x in self._specimen.requests
        ]

    def by_chance(self, request: int, point: Point) -> bool:
        """Tell whether a value follows chance."""
        one = self.all[request].values(point)
        return any(_differ(one, other[request].values(point)) for other in self.others)


def _differ(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> bool:
    return len(one) != len(two) or any(
        mistake(a.double().numpy(), b.double(), tolerant=False)
        for a, b in zip(one, two, strict=True)
    )


def drive(specimen: Specimen, grid: Grid, device: str = "cpu") -> Report:
    """Serve a specimen in every way of a grid; never raises for what the model does.

    Args:
        specimen: The model and its requests.
        grid: What to try. A GPU runs one pass at a time in every way.
        device: What the model and the reference run on, such as ``"cuda"``.
    """
    report = Report(specimen.name)
    truths = Truths(specimen, device)
    with torch.random.fork_rng(devices=[]):
        _ = truths.all, truths.others
    with warnings.catch_warnings():
        # Models warn as they like; catching is not for threads, so it is done around all of them.
        warnings.simplefilter("ignore")
        for way in grid.ways:
            with specimen.served() as served, _engine(way, device) as engine:
                try:
                    host = _load(engine, served, way, report)
                except LayertapError as error:
                    report.unloadable = str(error).splitlines()[0]
                    continue
                except Exception as error:  # noqa: BLE001 - a fault of ours is what is looked for
                    text = f"{type(error).__name__}: {error}".splitlines()[0]
                    report.cell(Extractor.AUTO, "load").failed.append(f"{way.name}: {text}")
                    continue
                _Drive(
                    engine, host, way=way, truths=truths, specimen=specimen, report=report,
                    grid=grid,
                ).run()  # fmt: skip
    return report


class _OneAtFirst(BatchQueue[Any]):
    """A queue of which one thread takes all work, and the others only after ``free``."""

    def __init__(self) -> None:
        super().__init__()
        self._first = threading.Lock()
        self._thread = 0
        self._free = threading.Event()

    def take(self) -> list[Any]:
        """See BatchQueue."""
        if self._first.acquire(blocking=False):
            self._thread = threading.get_ident()
        if threading.get_ident() != self._thread:
            self._free.wait()
        return super().take()

    def free(self) -> None:
        """Let the other threads take work, too."""
        self._free.set()

    def close(self) -> None:
        """See BatchQueue."""
        self.free()
        super().close()


@contextmanager
def _engine(way: Way, device: str) -> Iterator[Engine]:
    instances = way.instances if device == "cpu" else 1
    engine = Engine(device=device, threads=1, instances=instances)
    with patch.object(compute, "BatchQueue", _OneAtFirst if way.one_thread else BatchQueue):
        engine._threads(engine._device)
    try:
        yield engine
    finally:
        engine.close()


def _load(engine: Engine, specimen: Specimen, way: Way, report: Report) -> ModelHost:
    spec = ModelSpec(specimen.source, name="net", item_shape=specimen.item)
    policy = BatchPolicy(max_size=8, max_delay=0.02) if way.shared else ALONE
    options = HostOptions(batching=policy)
    if way.declared and not report.outputs:
        # What can be declared is known once the catalogue is.
        report.outputs = _outputs(engine.load(spec, options=options))
        engine.unload("net")
    declared = [LayerSelection(name) for name in report.outputs[-way.declared :]]
    host = engine.load(spec, declared if way.declared else [], options=options)
    report.outputs = _outputs(host)
    return host


def _outputs(host: ModelHost) -> list[str]:
    layers = _claims(host)[Extractor.HOOK]
    return [layer.name for layer in layers if layer.capture is Capture.OUTPUT]


def _claims(host: ModelHost) -> dict[Extractor, list[Layer]]:
    """Return what the catalogue says each extractor serves; AUTO serves what any of them does."""
    claims: dict[Extractor, list[Layer]] = {extractor: [] for extractor in Extractor}
    for entry in host.catalogue:
        for capture, point in entry.points.items():
            if point.kind is not PointKind.MODULE:
                continue
            layer = Layer(entry.name, capture, (point.path, str(capture), point.call, point.member))
            by = entry.served_by(capture)
            for extractor in [*by, Extractor.AUTO] if by else ():
                claims[extractor].append(layer)
    return claims


def _chosen(claims: dict[Extractor, list[Layer]], grid: Grid) -> dict[Extractor, list[Layer]]:
    """Leave out extractors that are not asked, and layers over what is compiled at once."""
    chosen = {extractor: claims[extractor] for extractor in grid.extractors}
    for extractor in (Extractor.TORCHSCRIPT, Extractor.AUTO):
        if layers := chosen.get(extractor):
            step = -(-len(layers) // grid.compiled)
            chosen[extractor] = layers[::-step][::-1]
    return chosen


class _Drive:
    def __init__(
        self,
        engine: Engine,
        host: ModelHost,
        *,
        way: Way,
        truths: Truths,
        specimen: Specimen,
        report: Report,
        grid: Grid,
    ) -> None:
        self._grid = grid
        self._engine = engine
        self._way = way
        self._truths = truths
        self._requests = specimen.requests
        self._twin = specimen.twin
        self._report = report
        self._claims = _chosen(_claims(host), grid)
        self._host = host
        self._lock = threading.Lock()
        report.notes.update(host.catalogue.notes, host.catalogue.scope.rules.notes)
        for entry in host.catalogue:
            if entry.calls:
                report.layers.add(entry.name)
                for extractor in entry.support:
                    if not entry.serves(extractor, Capture.OUTPUT):
                        report.refused.setdefault(extractor, set()).add(entry.name)

    def run(self) -> None:
        """Ask for everything, alone and then by eight callers."""
        self._ask_alone()
        queue = self._host.compute._queue
        if isinstance(queue, _OneAtFirst):
            queue.free()
        if self._way.callers:
            with ThreadPoolExecutor(CALLERS) as pool:
                barrier = threading.Barrier(CALLERS)
                for done in [pool.submit(self._call, n, barrier) for n in range(CALLERS)]:
                    done.result()

    def _ask_alone(self) -> None:
        grid = self._grid
        for extractor, layers in self._claims.items():
            for begin in range(0, len(layers), grid.most):
                for request in range(IN_A_ROW):
                    self._ask(extractor, layers[begin : begin + grid.most], request)
            if extractor in grid.singles:
                for layer in layers:
                    for request in range(IN_A_ROW):
                        self._ask(extractor, [layer], request)
        for request in range(IN_A_ROW, len(self._requests)):
            self._ask(Extractor.HOOK, self._claims.get(Extractor.HOOK, []), request)
        if grid.promotes:
            for _ in range(2):
                for request in range(len(self._requests)):
                    self._ask(Extractor.AUTO, self._claims[Extractor.AUTO][:20], request)

    def _call(self, caller: int, barrier: threading.Barrier) -> None:
        """Be one of several callers, each with an input of its own."""
        grid, request = self._grid, caller % len(self._requests)
        barrier.wait(60)
        for extractor in self._way.callers:
            layers = self._claims.get(extractor, [])
            self._ask(extractor, layers[: grid.most], request)
            self._ask(extractor, layers[-1:], request)
            if extractor in grid.singles:
                for layer in layers[caller::CALLERS] if grid.spread else layers:
                    self._ask(extractor, [layer], request)

    def _ask(self, extractor: Extractor, layers: Sequence[Layer], request: int) -> None:
        if not layers or not self._takes(request):
            return
        truth = self._truths.all[request]
        known = [layer for layer in layers if truth.values(layer.point)]
        if known != list(layers) and known:
            # A module that does not run for this input makes the request for all of them fail.
            self._ask_for(extractor, known, request)
            layers = [layer for layer in layers if layer not in known]
        self._ask_for(extractor, layers, request)

    def _takes(self, request: int) -> bool:
        """Tell whether the model says that it takes such a batch; else the door refuses it."""
        x = self._requests[request]
        try:
            given = x if isinstance(x, dict) else {"": x}
            self._host.model.signature.check(
                {
                    name: (tuple(each.shape), str(each.dtype).removeprefix("torch."))
                    for name, each in given.items()
                }
            )
        except InvalidInputError as error:
            self._report.door.add(str(error))
            return False
        return True

    def _ask_for(self, extractor: Extractor, layers: Sequence[Layer], request: int) -> None:
        truth = self._truths.all[request]
        x = self._requests[request]
        selections = [layer.selection for layer in layers]
        where = f"{self._way.name}, request {request}"
        there = all(truth.values(layer.point) for layer in layers)
        try:
            features = ask(self._engine, "net", selections, x, extractor)
        except ExtractorUnsupportedError as error:
            if "holds NaN or infinity" in str(error):
                # Said of every compiled program by the documentation; AUTO takes HOOK for them.
                self._report.door.add(str(error))
                return
            # A layer that is not there on this input can only be refused.
            if there:
                self._note(extractor, layers, "late", f"{where}: {error}")
        except LayertapError as error:
            if not truth.error and there:
                self._note(extractor, layers, "failed", f"{where}: {error}")
        except Exception as error:  # noqa: BLE001 - a fault of the server is what is looked for
            text = (str(error).splitlines() or [""])[-1]
            self._note(extractor, layers, "failed", f"{where}: {type(error).__name__}: {text}")
        else:
            for layer in layers:
                self._compare(extractor, layer, features, request, where)

    def _compare(
        self, extractor: Extractor, layer: Layer, features: Features, request: int, where: str
    ) -> None:
        if self._truths.by_chance(request, layer.point):
            with self._lock:
                self._report.chance.add(layer.name)
            return
        if self._report.stateful:
            return
        tolerant = extractor in TOLERANT or self._way.shared or self._twin
        values = self._truths.all[request].values(layer.point)
        got = features[layer.text]
        mistakes = [mistake(got, value, tolerant=tolerant) for value in values]
        if not values:
            self._note(extractor, [layer], "wrong", f"{where}: the module returned no tensor there")
        elif all(mistakes):
            by = features.extractor.name
            self._note(extractor, [layer], "wrong", f"{where}, by {by}: {mistakes[-1]}")
        else:
            with self._lock:
                self._report.cell(extractor, layer.text).answers += 1

    def _note(self, extractor: Extractor, layers: Sequence[Layer], kind: str, text: str) -> None:
        with self._lock:
            for layer in layers:
                getattr(self._report.cell(extractor, layer.text), kind).append(text)
