"""The output of the commands: tables on stdout, messages and progress on stderr.

rich omits colours if the stream is not a terminal or NO_COLOR is set.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from layertap.description import LayerDescription, ModelDescription, PassDescription
from layertap.selection import Capture, Extractor

if TYPE_CHECKING:
    from layertap.dataset.pipeline import Progress as RunProgress
    from layertap.dataset.run import Outcome

__all__ = ["Stderr", "console", "show_layers", "show_outputs"]

LETTERS = {each: each.letter for each in reversed(Extractor) if each.letter}
"""The letters of the extractors in tables; those that AUTO prefers come last."""

UNBOUNDED = 10_000
_LINE_SECONDS = 30.0
_MARKS = {logging.WARNING: "warning: ", logging.ERROR: "error: "}
_BY = ("by", "in by")


def console(stream: TextIO | None = None) -> Console:
    """Return a console that prints text unchanged: ``[B, 64]`` is not read as markup.

    Output to a pipe or a file is never cut to the width of a terminal.
    """
    made = Console(file=stream, markup=False, highlight=False)
    if not made.is_terminal:
        made.width = UNBOUNDED
    return made


class Stderr:
    """Messages and progress on stderr; a ``layertap.app.narrator.Narrator``."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False, highlight=False)

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Print a line, and mark errors and warnings.

        If stderr can't be written to, for example because it is a file on a full disk, the line is
        lost. Like an error inside logging, that must not end the server.
        """
        with suppress(OSError):
            self._console.print(f"layertap: {_MARKS.get(level, '')}{text}", soft_wrap=True)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show a spinner, if stderr is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(Text(f"{text} …")):
            yield

    @contextmanager
    def progress(self, noun: str, total: int) -> Iterator[Callable[[RunProgress], None]]:
        """Yield what shows how far a run is: a bar, or a line every 30 seconds without a terminal.

        Args:
            noun: What the items are called.
            total: How many there are.
        """
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        said = time.monotonic()
        with bar:
            task = bar.add_task(noun, total=total, words="")

            def show(progress: RunProgress) -> None:
                nonlocal said
                bar.update(
                    task, total=progress.total, completed=progress.done, words=_words(progress)
                )
                now = time.monotonic()
                if not self._console.is_terminal and now - said > _LINE_SECONDS:
                    said = now
                    self.say(f"{progress.done} of {progress.total} {noun}, {_words(progress)}")

            yield show


def _words(progress: RunProgress) -> str:
    """Return such as ``52.1/s, 3 min left, limited by the model, 2 failed``."""
    words = [f"{progress.rate:.1f}/s"]
    if progress.remaining is not None:
        words.append(f"{_duration(progress.remaining)} left")
    if progress.stage:
        words.append(f"limited by {'the ' * (progress.stage == 'model')}{progress.stage}")
    if progress.failed:
        words.append(f"{progress.failed} failed")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_layers(model: ModelDescription, layers: Sequence[LayerDescription], *, tree: bool) -> None:
    """Print some layers of a model, as a tree of modules or a flat table in execution order."""
    out = console()
    taken = ", ".join(map(str, model.inputs))
    free = list(dict.fromkeys(dim.free for each in model.inputs for dim in each.shape if dim.free))
    note = f" ({', '.join(free)}: any size, here the default)" if free else ""
    out.print(
        f"{model.name}: {model.source}, weights {model.weights}, on {model.device}; takes "
        f"{taken}{note}",
        soft_wrap=True,
    )
    for given in model.inputs:
        if given.images:
            out.print(f"images: {given.preprocessing}", soft_wrap=True)
        if given.texts:
            out.print(f"texts: {given.tokenization}", soft_wrap=True)
        if given.sampling_rate:
            out.print(f"audio: {given.audio_preprocessing}", soft_wrap=True)
    if passes := _passes(model.passes):
        out.print(f"passes: {passes}", soft_wrap=True)
    for note in model.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(_tree(layers) if tree else _flat(layers))
    if tree:
        for reason, names in _unserved(layers).items():
            out.print(f"none: {', '.join(names)}: {reason}", soft_wrap=True)
    for plan in model.refused_plans:
        at = ", ".join(map(str, plan.inputs))
        out.print(f"refused: {', '.join(plan.layers)} at {at}: {plan.reason}", soft_wrap=True)
    legend = ", ".join(f"{letter} {extractor.name}" for extractor, letter in LETTERS.items())
    out.print(
        f"by: {legend}; in by: the same for its input; B: the batch; bytes: of one item of the "
        "default size" + ("; values are float32 where no type is given" if tree else ""),
        soft_wrap=True,
    )


def _passes(passes: PassDescription | None) -> str:
    """Describe how a model's passes run; empty if there are no restrictions."""
    if passes is None:
        return ""
    states = {"reset": "the loaded state is restored after each", "kept": "the model is stateful"}
    words = [
        "" if passes.early_stop else "to their end",
        "" if passes.concurrent else "one at a time",
        "" if passes.shared else "not shared by requests",
        states.get(passes.state, ""),
    ]
    return ", ".join(filter(None, words))


def show_outputs(outcome: Outcome, changes: Sequence[str] = ()) -> None:
    """Print the outputs of a run: shape, dtype, and the extractor that captured the layer.

    Args:
        outcome: What the run did.
        changes: The texts of its interventions, whose elements are counted in a second table.
    """
    table = _table("layer", "shape", "dtype", "extractor")
    how = f"{outcome.extractor} {outcome.variant}".rstrip()
    for name, output in outcome.outputs.items():
        varying = ["*"] if output.ragged else []
        shape = ", ".join(map(str, [outcome.rows, *varying, *output.shape]))
        table.add_row(name, f"[{shape}]", output.dtype, how)
    console().print(table)
    if not outcome.changed:
        return  # No item has a row, or the output is that of an older version.
    table = _table("change", "elements>", "changed>")
    for text, each in zip(changes, outcome.changed, strict=True):
        table.add_row(text, f"{each.elements:,}", f"{each.changed:,}")
    console().print(table)


def _flat(layers: Sequence[LayerDescription]) -> Table:
    """Return a table with all details, one layer per line."""
    table = _table(
        "layer", "type", "calls>", "output", "dtype", "bytes>", "stride>", *_BY, "why none"
    )
    for layer in layers:
        size = f"{layer.output.bytes_per_item:,}" if layer.output else ""
        table.add_row(
            layer.name, layer.type, str(layer.calls), *_output(layer, size), _reason(layer)
        )
    return table


def _tree(layers: Sequence[LayerDescription]) -> Table:
    """Return a tree of modules, with rounded numbers so that most models fit into 90 columns."""
    table = _table("layer", "type", "output", "bytes>", "stride>", *_BY)
    # On a narrow terminal the types are cut, as their beginning is enough to recognise them.
    table.columns[1].no_wrap = False
    table.columns[1].overflow = "ellipsis"
    for label, layer in _branches(layers):
        if layer is None:
            table.add_row(label)
            continue
        times = f"×{layer.calls}" if layer.calls > 1 else ""
        size = _short(layer.output.bytes_per_item) if layer.output else ""
        pattern, dtype, *rest = _output(layer, size)
        shape = _short_rounding(pattern)
        # float32 is the usual dtype and is not shown; any other dtype is.
        value = shape if dtype == "float32" else f"{shape} {dtype}"
        table.add_row(label, f"{layer.type}{times}", value, *rest)
    return table


def _table(*headings: str) -> Table:
    """Return an empty table; ``>`` after a heading aligns its column to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        name = heading.removesuffix(">")
        table.add_column(name, no_wrap=True, justify="right" if name != heading else "left")
    return table


def _output(layer: LayerDescription, size: str) -> tuple[str, ...]:
    """Return the cells about a layer's values and the extractors that serve it."""
    outputs, inputs = (_letters(layer, side) for side in (Capture.OUTPUT, Capture.INPUT))
    value = layer.output
    if value is None:
        return ("", "", "", "", outputs or "none", inputs)
    stride = f"{layer.stride:g}" if layer.stride else ""
    dtype = f"{value.dtype} of {value.quantized}" if value.quantized else value.dtype
    return value.pattern, dtype, size, stride, outputs or "none", inputs


def _short_rounding(shape: str) -> str:
    """Return a shape with ``⌈H/4⌉`` in place of ``ceil(H/4)``, and alike for ``floor``."""
    signs = {"ceil(": ("⌈", "⌉"), "floor(": ("⌊", "⌋"), "(": ("(", ")")}
    ends: list[str] = []
    text = ""
    while shape:
        begin = next((each for each in signs if shape.startswith(each)), "")
        if begin:
            text += signs[begin][0]
            ends.append(signs[begin][1])
        else:
            text += ends.pop() if shape[0] == ")" and ends else shape[0]
        shape = shape[len(begin) or 1 :]
    return text


def _reason(layer: LayerDescription) -> str:
    """Return why no extractor serves a layer's output; empty if one does."""
    if layer.extractors(Capture.OUTPUT):
        return ""
    reasons = (by.get(Capture.OUTPUT, "") for by in layer.refusals.values())
    return next(filter(None, reasons), "")


def _unserved(layers: Iterable[LayerDescription]) -> dict[str, list[str]]:
    """Return the names of layers that no extractor serves, by reason."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if reason := _reason(layer):
            found.setdefault(reason, []).append(layer.name)
    return found


def _short(size: int) -> str:
    """Return a size in the unit that gives the shortest number: ``784 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 10_000:
            return f"{size} {unit}"
        size = round(size / 1024)
    return f"{size} GiB"


def _letters(layer: LayerDescription, side: Capture) -> str:
    """Return a letter or a dash for each extractor, in a fixed order so that columns line up."""
    able = set(layer.extractors(side))
    if not able:
        return ""
    return "".join(letter if e in able else "-" for e, letter in LETTERS.items())


_DOTS = re.compile(r"\.(?![^\[]*\])")
"""The dots in a name that are not inside brackets, as that of ``pack[a.b]`` is."""


class _Branch:
    """A component of a dotted name, and the components below it."""

    def __init__(self) -> None:
        self.layer: LayerDescription | None = None
        self.below: dict[str, _Branch] = {}


def _branches(
    layers: Sequence[LayerDescription],
) -> Iterator[tuple[str, LayerDescription | None]]:
    """Yield every component of the names, prefixed by the lines that draw the tree."""
    root = _Branch()
    for layer in layers:
        branch = root
        for part in _DOTS.split(layer.name):
            branch = branch.below.setdefault(part, _Branch())
        branch.layer = layer
    yield from _drawn(root, "", top=True)


def _drawn(
    branch: _Branch, indent: str, *, top: bool = False
) -> Iterator[tuple[str, LayerDescription | None]]:
    last = next(reversed(branch.below), None)
    for name, below in branch.below.items():
        elbow, line = ("└─ ", "   ") if name == last else ("├─ ", "│  ")
        yield (name if top else f"{indent}{elbow}{name}"), below.layer
        yield from _drawn(below, "" if top else indent + line)
