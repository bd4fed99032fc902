"""Does every extractor return what the module returned, for every layer that it claims?

``python tests/coverage/prove.py --write docs/coverage.md`` asks that of every torchvision model and
of timm models of many families, with random weights and small inputs, and writes the table.
``make test`` asks it of a sample (``test_prove.py``).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision

from layertap.errors import ExtractorUnsupportedError, LayertapError, ModelLoadError
from layertap.extraction import Catalogue, PlanBuilder, Taps, measure
from layertap.extraction.containers import pick
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.survey import sample_input
from layertap.extraction.verify import TORCHSCRIPT_TOLERANCE, difference
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor

SIDES = (64, 96, 128, None)
"""Heights and widths to try; None is the model's own."""

ORDER = (
    Extractor.HOOK, Extractor.FX, Extractor.CHILDREN, Extractor.LAYER_GETTER, Extractor.TORCHSCRIPT,
)  # fmt: skip


@dataclass
class Tally:
    """What became of one extractor's layers: served right, refused by the catalogue, wrong."""

    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: str = ""


@dataclass
class Row:
    """One model's line of the table."""

    model: str
    item_shape: tuple[int, ...] = ()
    layers: int = 0
    silent: int = 0
    tallies: dict[Extractor, Tally] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


@dataclass
class Subject:
    """A model under proof: its plans, a batch, and the oracle's values for it."""

    plans: PlanBuilder
    x: torch.Tensor
    oracle: dict[tuple[str, Capture, int], Any]


def prove(source: str) -> Row:
    """Load a model at the smallest size that it takes, and hold every extractor to the oracle."""
    begun = time.perf_counter()
    row = Row(source)
    try:
        model, catalogue = _smallest(source)
    except LayertapError as error:
        row.error = str(error).splitlines()[0]
        return row
    row.item_shape = model.input.item_shape
    entries = [entry for entry in catalogue if entry.kind is PointKind.MODULE and entry.calls]
    row.layers = len(entries)
    row.silent = sum(not entry.calls for entry in catalogue)
    x = sample_input(model, 2, row.item_shape)
    plans = PlanBuilder(model, Taps(model.module), catalogue)
    subject = Subject(plans, x, _oracle(model, x))
    for extractor in ORDER:
        tally = row.tallies[extractor] = Tally()
        points = []
        for entry in entries:
            for capture, point in entry.points.items():
                if entry.serves(extractor, capture):
                    points.append(point)
                else:
                    tally.refused += capture is Capture.OUTPUT
        _check(subject, extractor, points, tally)
    row.seconds = time.perf_counter() - begun
    return row


def _smallest(source: str) -> tuple[LoadedModel, Catalogue]:
    error: LayertapError = ModelLoadError("no size tried")
    for side in SIDES:
        try:
            own = load_model(ModelSpec.parse(source, weights="random"))
            shape = own.input.item_shape
            if side is not None:
                shape = (*shape[:-2], min(side, shape[-2]), min(side, shape[-1]))
            model = load_model(ModelSpec.parse(source, weights="random", item_shape=shape))
            return model, measure(model)
        except LayertapError as raised:
            error = raised
    raise error


def _oracle(model: LoadedModel, x: torch.Tensor) -> dict[tuple[str, Capture, int], Any]:
    """Clone everything at every hook, with nothing of layertap."""
    seen: dict[tuple[str, Capture, int], Any] = {}
    calls: dict[tuple[str, Capture], int] = {}
    handles = []

    def clone(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
            return tuple(clone(member) for member in value)
        if isinstance(value, dict):
            return {key: clone(member) for key, member in value.items()}
        return value

    def note(path: str, side: Capture, value: Any) -> None:
        call = calls.get((path, side), 0)
        calls[path, side] = call + 1
        seen[path, side, call] = clone(value)

    for path, module in model.module.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: note(
                    path,
                    Capture.INPUT,
                    args[0]
                    if len(args) == 1 and not kwargs
                    else {**{str(i): a for i, a in enumerate(args)}, **kwargs},
                ),
                with_kwargs=True,
            )
        )
        handles.append(
            module.register_forward_hook(
                lambda m, args, output, path=path: note(path, Capture.OUTPUT, output)
            )
        )
    model.forward(x.clone())
    for handle in handles:
        handle.remove()
    return seen


def _check(
    subject: Subject, extractor: Extractor, points: Sequence[CapturePoint], tally: Tally
) -> None:
    def compare(index: int, value: torch.Tensor) -> None:
        point = points[index]
        expected = pick(subject.oracle[point.path, point.capture, point.call], point.member)
        if expected is None:
            tally.wrong.append(f"{point.path} ({point.capture}): no oracle")
            return
        compiled = extractor is Extractor.TORCHSCRIPT
        tolerance = TORCHSCRIPT_TOLERANCE.get(expected.dtype, 0.0) if compiled else 0.0
        error = difference(value, expected)
        if error > tolerance:
            tally.wrong.append(f"{point.path} ({point.capture}): {error:.0e}")
        else:
            tally.right += point.capture is Capture.OUTPUT

    if points:
        x = subject.x
        try:
            subject.plans.construct(extractor, points, x[:1].clone()).run(x.clone(), compare)
        except ExtractorUnsupportedError as error:
            tally.failed = str(error)


def torchvision_models() -> list[str]:
    """Return every float builder of torchvision that takes one input, by kind."""
    names: list[str] = []
    kinds = (
        torchvision.models, torchvision.models.segmentation, torchvision.models.video,
        torchvision.models.detection,
    )  # fmt: skip
    for kind in kinds:
        names += torchvision.models.list_models(module=kind)
    return names


def table(rows: Iterable[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | item | layers | never run | "
        + " | ".join(extractor.name for extractor in ORDER)
        + " | wrong |",
        "| --- | --- | --- | --- | " + "--- | " * len(ORDER) + "--- |",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.model} | – | – | – | {'– | ' * len(ORDER)} {row.error} |")
            continue
        cells = []
        for extractor in ORDER:
            tally = row.tallies[extractor]
            cells.append("none" if tally.failed else f"{tally.right} / {tally.refused}")
        wrong = sum(len(tally.wrong) for tally in row.tallies.values())
        item = "×".join(map(str, row.item_shape))
        cells = [row.model, item, str(row.layers), str(row.silent), *cells, str(wrong)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prove every model named, or all of them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="torchvision or timm: names; all if none")
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    options = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name in options.models or torchvision_models():
            row = prove(name)
            rows.append(row)
            gc.collect()
            problems = [w for t in row.tallies.values() for w in t.wrong[:3]]
            problems += [t.failed for t in row.tallies.values() if t.failed]
            counts = " ".join(f"{e.name}={row.tallies[e].right}" for e in ORDER if row.tallies)
            print(f"{name:32} {row.seconds:6.1f} s  {counts} {row.error} {problems}", flush=True)
            if options.write:  # Each time, so that a run that is cut keeps what it has.
                options.write.write_text(HEADER + table(rows), "utf-8")
    wrong = sum(len(t.wrong) for row in rows for t in row.tallies.values())
    print(f"{len(rows)} models, {wrong} wrong")
    return 1 if wrong else 0


HEADER = """# Coverage

Every layer of every model below, by every extractor that the catalogue says serves it, held
against cloning hooks at a batch of two: bit for bit, TORCHSCRIPT within its tolerance. Random
weights, the smallest of a few input sizes that the model takes. `make test-models` writes this.

A cell is *layers served right / layers that the catalogue refuses for this extractor*; HOOK and
TORCHSCRIPT were held to the layers' inputs as well.

"""


if __name__ == "__main__":
    sys.exit(main())
