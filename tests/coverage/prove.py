"""Does every extractor return what the module returned, for every layer that it claims?

``python tests/coverage/prove.py --write docs/coverage.md`` asks that of every torchvision model and
of timm models of many families, with random weights and small inputs, and writes the table.
``make test`` asks it of a sample (``test_prove.py``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from page import write_section
from subjects import every_model
from truths import Key, module_values, node_values

from layertap.engine.contest import Entrant
from layertap.errors import ExtractorUnsupportedError, LayertapError, ModelLoadError
from layertap.extraction import Catalogue, LayerEntry, PlanBuilder, Taps, measure
from layertap.extraction.containers import pick
from layertap.extraction.kinds.registry import kind_of
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.tf32 import allow_tf32
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import Batch, LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor

SIDES = (64, 96, 128, None)
"""Heights and widths to try; None is the model's own."""

BATCH = 2
GROUP_BYTES = 3 << 30
"""Of the values that are asked for at once; a video model's are tens of GB together."""

ORDER = (
    Entrant(Extractor.HOOK), Entrant(Extractor.FX), Entrant(Extractor.CHILDREN),
    Entrant(Extractor.LAYER_GETTER), Entrant(Extractor.TORCHSCRIPT),
)  # fmt: skip
"""What is asked by default; see also prove_export and prove_channels_last."""


@dataclass
class Tally:
    """What became of one extractor's layers: served right, refused by the catalogue, wrong.

    Graph nodes that were served right are counted apart; ``compared`` counts every value, inputs
    and nodes included.
    """

    right: int = 0
    nodes: int = 0
    compared: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: str = ""
    reasons: list[str] = field(default_factory=list)
    """Why layers were refused, for each of them."""
    off: list[str] = field(default_factory=list)
    """Values of a compiled plan that were wrong, which a server would refuse to serve."""
    unbuilt: list[str] = field(default_factory=list)
    """Why plans were refused when they were built."""


@dataclass
class Row:
    """One model's line of the table."""

    model: str
    item_shape: tuple[int, ...] = ()
    layers: int = 0
    silent: int = 0
    nodes: int = 0
    tallies: dict[Entrant, Tally] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


@dataclass
class Subject:
    """A model under proof: its plans, a batch, and the reference values for it."""

    plans: PlanBuilder
    x: Batch
    modules: Mapping[Key, Any]
    nodes: Mapping[str, torch.Tensor]

    def truth(self, point: CapturePoint) -> torch.Tensor | None:
        """Return the value of a point, as a reference pass saw it."""
        if point.kind is PointKind.NODE:
            return self.nodes.get(point.path)
        return pick(self.modules[point.path, point.capture.value, point.call], point.member)


def prove(source: str, device: str = "cpu", order: Sequence[Entrant] = ORDER) -> Row:
    """Load a model at the smallest size that it takes, and compare extractors with it.

    Args:
        source: The model, such as ``"resnet18"``.
        device: What it runs on, such as ``"cuda"``.
        order: The extractors, and how their programs are finished.
    """
    begun = time.perf_counter()
    row = Row(source)
    try:
        model, catalogue = _smallest(source, device)
    except LayertapError as error:
        row.error = str(error).splitlines()[0]
        return row
    row.item_shape = model.signature.main.shape
    modules = (entry for entry in catalogue if entry.kind is PointKind.MODULE)
    # A further name of a layer is no further layer.
    entries = [entry for entry in modules if entry.calls and not entry.same_as]
    # Entries without an output are members of an input, such as a list of tensors: no layers.
    row.layers = sum(Capture.OUTPUT in entry.points for entry in entries)
    row.nodes = sum(entry.kind is PointKind.NODE for entry in catalogue)
    row.silent = sum(not entry.calls for entry in catalogue)
    row.tallies = {entrant: Tally() for entrant in order}
    plans = PlanBuilder(model, Taps(model.module), catalogue)
    for entry in entries:
        for (extractor, _), tally in row.tallies.items():
            if Capture.OUTPUT in entry.points and not entry.serves(extractor, Capture.OUTPUT):
                tally.refused += 1
                tally.reasons.append(entry.refusal(extractor))
    x = ordinary_batch(model, BATCH)
    for group in _groups([each for each in catalogue if each.points and not each.same_as]):
        subject = _subject(model, plans, x, group)
        for entrant, tally in row.tallies.items():
            points = [
                point
                for entry in group
                for capture, point in entry.points.items()
                if entry.serves(entrant.extractor, capture)
            ]
            _check(subject, entrant, points, tally)
    row.seconds = time.perf_counter() - begun
    return row


def _groups(entries: Sequence[LayerEntry]) -> Iterator[list[LayerEntry]]:
    """Cut the layers into runs whose values fit into memory several times over."""
    group: list[LayerEntry] = []
    size = 0
    for entry in entries:
        own = BATCH * sum(spec.bytes_per_item for spec in entry.specs.values())
        if group and size + own > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(entry)
        size += own
    yield group


def _subject(
    model: LoadedModel, plans: PlanBuilder, x: Batch, group: Sequence[LayerEntry]
) -> Subject:
    points = [point for entry in group for point in entry.points.values()]
    nodes = [point.path for point in points if point.kind is PointKind.NODE]
    calls = {
        (point.path, point.capture.value, point.call)
        for point in points
        if point.kind is PointKind.MODULE
    }
    return Subject(
        plans,
        x,
        module_values(model.module, lambda: model.forward(x.clone()), calls),
        node_values(model.module, nodes, x.only.clone()) if nodes else {},
    )


def _smallest(source: str, device: str) -> tuple[LoadedModel, Catalogue]:
    error: LayertapError = ModelLoadError("no size tried")
    for side in SIDES:
        try:
            own = load_model(ModelSpec.parse(source, weights="random"), device)
            shape = own.signature.main.shape
            if side is not None:
                shape = (*shape[:-2], min(side, shape[-2]), min(side, shape[-1]))
            spec = ModelSpec.parse(source, weights="random", item_shape=shape)
            model = load_model(spec, device)
            return model, measure(model)
        except LayertapError as raised:
            error = raised
    raise error


def _check(
    subject: Subject, entrant: Entrant, points: Sequence[CapturePoint], tally: Tally
) -> None:
    kind = kind_of(entrant.extractor)

    def compare(index: int, value: torch.Tensor) -> None:
        point = points[index]
        tally.compared += 1
        expected = subject.truth(point)
        if expected is None:
            tally.wrong.append(f"{point.path} ({point.capture}): no reference")
            return
        tolerance = COMPILED_TOLERANCE.get(expected.dtype, 0.0) if kind.compiled else 0.0
        error = difference(value, expected)
        if error > tolerance:
            tally.wrong.append(f"{point.path} ({point.capture}): {error:.0e}")
        else:
            whole = point.capture is Capture.OUTPUT and point.kind is PointKind.MODULE
            tally.right += whole
            tally.nodes += point.kind is PointKind.NODE

    if points:
        x = subject.x
        try:
            built = subject.plans.construct(
                entrant.extractor, PassSpec(tuple(points)), x.narrow(0, 1).clone(), entrant.variant
            )
            built.run(x.clone(), compare)
        except ExtractorUnsupportedError as error:
            tally.failed = str(error)
            tally.unbuilt.append(tally.failed)
        except RuntimeError as error:
            if not entrant.variant:
                raise
            # A program may need the usual layout; a server then refuses the variant.
            tally.failed = f"its program fails: {str(error).strip().splitlines()[-1]}"
            tally.unbuilt.append(tally.failed)
    if kind.compiled and tally.wrong:
        # Before a compiled plan serves, it is compared with the same reference on this very batch.
        # So such a request gets an error, and no client gets a wrong value.
        tally.failed = f"refused when built: {', '.join(tally.wrong[:3])}"
        tally.off += tally.wrong
        tally.wrong.clear()


def table(rows: Iterable[Row]) -> str:
    """Return the rows as Markdown."""
    rows = list(rows)
    order = next((list(row.tallies) for row in rows if row.tallies), list(ORDER))
    lines = [
        "| model | item | layers | never run | nodes | "
        + " | ".join(map(str, order))
        + " | wrong |",
        "| --- | --- | --- | --- | --- | " + "--- | " * len(order) + "--- |",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.model} | – | – | – | – | {'– | ' * len(order)} {row.error} |")
            continue
        cells = []
        for entrant in order:
            tally = row.tallies[entrant]
            cells.append("none" if tally.failed else f"{tally.right} / {tally.refused}")
        wrong = sum(len(tally.wrong) for tally in row.tallies.values())
        item = "×".join(map(str, row.item_shape))
        nodes = f"{sum(tally.nodes for tally in row.tallies.values())} / {row.nodes}"
        cells = [row.model, item, str(row.layers), str(row.silent), nodes, *cells, str(wrong)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


HEADER = """## Models of torchvision and timm

Every layer of every model below, by every extractor that the catalogue says serves it, held
against cloning hooks: bit for bit, TORCHSCRIPT within its tolerance. All layers of a model are
asked for in one request of two items, in several where their values are over 3 GiB. Random weights,
the smallest of a few input sizes that the model takes. `make test-models` writes this section.

{models} models, {layers} layers, {values} values compared, **{wrong} wrong**.

A cell is *layers served right / layers that the catalogue refuses for this extractor*; *none* where
the plan of all layers at once was refused when it was built, which a request is told. HOOK and
TORCHSCRIPT were held to the layers' inputs as well. *nodes* are operations of the symbolic graph
that are no module, served by FX and held against an interpreter of the graph that leaves out none.

"""


def section(rows: Sequence[Row]) -> str:
    """Return the section of docs/coverage.md."""
    tallies = [tally for row in rows for tally in row.tallies.values()]
    return HEADER.format(
        models=len(rows),
        layers=f"{sum(row.layers for row in rows):,}",
        values=f"{sum(tally.compared for tally in tallies):,}",
        wrong=sum(len(tally.wrong) for tally in tallies),
    ) + table(rows)


def _apart(name: str, device: str, order: Sequence[Entrant]) -> Row:
    """Prove a model in a process of its own, so that all memory of it is given back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(quietly, name, device, order).result()


def quietly(name: str, device: str, order: Sequence[Entrant]) -> Row:
    """Prove a model on one thread, without autograd, in full precision."""
    torch.set_num_threads(1)  # There is a process for each core already.
    allow_tf32(False)
    with torch.inference_mode():
        return prove(name, device, order)


def _tell(row: Row) -> None:
    problems = [wrong for tally in row.tallies.values() for wrong in tally.wrong[:3]]
    problems += [tally.failed for tally in row.tallies.values() if tally.failed]
    counts = " ".join(f"{entrant}={tally.right}" for entrant, tally in row.tallies.items())
    print(f"{row.model:32} {row.seconds:6.1f} s  {counts} {row.error} {problems}", flush=True)


def _rows(models: Sequence[str], jobs: int, device: str, order: Sequence[Entrant]) -> Iterator[Row]:
    """Prove models, some at once; those for which the memory did not do beside others, alone."""
    killed = []
    with ThreadPoolExecutor(jobs) as pool:
        proofs = {name: pool.submit(_apart, name, device, order) for name in models}
        for name, proof in proofs.items():
            try:
                yield proof.result()
            except BrokenProcessPool:
                killed.append(name)
    yield from (_apart(name, device, order) for name in killed)


def entrant_of(text: str) -> Entrant:
    """Return what a text such as ``torchscript/channels_last`` names."""
    name, _, variant = text.partition("/")
    return Entrant(Extractor(name), variant)


def _place(row: Row) -> tuple[bool, str]:
    return row.model.startswith("timm:"), row.model


def main() -> int:
    """Prove every model named, or all of them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="torchvision or timm: names; all if none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at once")
    parser.add_argument("--device", default="cpu", help="what the models run on, such as cuda")
    parser.add_argument(
        "--extractors", nargs="+", type=entrant_of, default=ORDER,
        help="such as hook torchscript/channels_last",
    )  # fmt: skip
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    options = parser.parse_args()
    rows = []
    models = options.models or every_model()
    for row in _rows(models, options.jobs, options.device, options.extractors):
        rows.append(row)
        _tell(row)
        if options.write:  # Each time, so that a run that is cut keeps what it has.
            write_section(options.write, "models", section(sorted(rows, key=_place)))
    wrong = sum(len(t.wrong) for row in rows for t in row.tallies.values())
    print(f"{len(rows)} models, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
