"""Every way to take layers out of a model in this process, each proven right before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from layertap import Extractor, Features
from layertap.engine.pipeline import publish
from layertap.engine.reply_layout import Envelope, reply_writer
from layertap.engine.resolve import Resolved, resolve
from layertap.engine.staging import Staging, proven_staging
from layertap.errors import ExtractorUnsupportedError, ReplyTooLargeError
from layertap.extraction import Plan, PlanBuilder, Taps, measure
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.verify import compiled_tolerance, difference
from layertap.models import Batch, LoadedModel
from layertap.selection import Capture, LayerSelection, is_glob
from layertap.services.native_form import NativeForm
from layertap.timings import Timings

__all__ = ["BLOCKING", "EAGER", "GRAPH", "INTO_REPLY", "Way", "Ways"]

EAGER = "full eager pass with cloning hooks"
INTO_REPLY = "HOOK, into the reply"
BLOCKING = "HOOK, into the reply, copies that block"
GRAPH = "{}, CUDA graph"

Way = Callable[[], Any]


class Ways:
    """The ways for one model; measured once, asked for many layer sets.

    Args:
        model: The model, on its device.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self.catalogue: Catalogue = measure(model)
        self._builder = PlanBuilder(model, Taps(model.module), self.catalogue)
        self._cuda = model.device.type == "cuda"
        self._staging = proven_staging(model.device)
        self.refused: dict[str, str] = {}
        """Why ways could not be built for the layers that were asked for last, by their name."""

    def of(self, layers: Sequence[str], x: Batch) -> dict[str, Way]:
        """Return every way that serves all of these layers, by its name.

        ``EAGER`` is today's habit; the extractors keep a clone of each value, as any caller in the
        same process would; ``INTO_REPLY`` ends with the finished message instead. On a GPU
        ``BLOCKING`` is the same without page-locked memory and a second stream, and ``GRAPH`` an
        extractor's pass as a CUDA graph, where it can be recorded.

        Args:
            layers: Names, or globs over them.
            x: The batch, on the model's device.

        Raises:
            SystemExit: Where a way is wrong: a wrong answer has no speed.
        """
        selections = tuple(LayerSelection(name) for name in self._names(layers))
        wanted = resolve(self._model, self.catalogue, selections, Extractor.AUTO, max_layers=4096)
        truth = self._eager(wanted, x)
        ways: dict[str, Way] = {EAGER: lambda: self._eager(wanted, x)}
        self.refused = {}
        for extractor in wanted.candidates:
            try:
                plan = self._builder.build(extractor, wanted.pass_spec, x.key)
            except ExtractorUnsupportedError as refusal:
                self.refused[extractor.name] = str(refusal)
                continue
            way: Way = partial(_cloned, plan.built, wanted, x)
            ways[extractor.name] = way
            _check(extractor, way(), truth)
            if extractor is Extractor.HOOK:
                for name, message in self._messages(plan, wanted, x).items():
                    try:
                        sent = _sent(message, wanted)
                    except ReplyTooLargeError as refusal:
                        self.refused[name] = str(refusal)
                        continue
                    ways[name] = message
                    _check(extractor, sent, truth)
            if self._cuda and extractor in (Extractor.HOOK, Extractor.TORCHSCRIPT):
                ways |= self._graph(extractor, wanted, x, truth)
        return ways

    def _names(self, layers: Sequence[str]) -> Iterator[str]:
        """Yield the layers that globs match, and those named; see ``LayerEntry.is_used``.

        Attention weights that no module returns can't be had from an eager pass.
        """
        for layer in layers:
            if not is_glob(layer):
                yield layer
                continue
            for entry in self.catalogue.match(layer):
                if entry.is_used and entry.serves(Extractor.HOOK, Capture.OUTPUT):
                    yield entry.name

    def _messages(self, plan: Plan, wanted: Resolved, x: Batch) -> dict[str, Way]:
        ways = {INTO_REPLY: lambda: _message(plan, wanted, x, self._staging)}
        if self._cuda:
            ways[BLOCKING] = lambda: _message(plan, wanted, x)
        return ways

    def _graph(
        self, extractor: Extractor, wanted: Resolved, x: Batch, truth: list[torch.Tensor]
    ) -> dict[str, Way]:
        """Return an extractor's pass as a CUDA graph; nothing where it can't be recorded."""
        plan = self._builder.build(extractor, wanted.pass_spec, x.key)
        name = GRAPH.format(extractor.name)
        replayed, recorded = self._builder.prover.record(plan, [x.size])
        if not recorded:
            self.refused[name] = "the pass can't be recorded"
            return {}
        _check(extractor, _cloned(replayed.built, wanted, x), truth)
        return {name: lambda: _cloned(replayed.built, wanted, x)}

    def _eager(self, wanted: Resolved, x: Batch) -> list[torch.Tensor]:
        """Register hooks, run the whole model, remove them."""
        kept: dict[str, list[Any]] = {point.path: [] for point in wanted.points}

        def keep(values: list[Any]) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                values.append(_clone(output))

            return hook

        handles = [
            self._model.module.get_submodule(path).register_forward_hook(keep(values))
            for path, values in kept.items()
        ]
        self._model.forward(x)
        for handle in handles:
            handle.remove()
        return [_member(kept[point.path][point.call], point.member) for point in wanted.points]


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {str(key): _clone(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return {str(index): _clone(each) for index, each in enumerate(value)}
    return value


def _member(value: Any, way: Sequence[str]) -> torch.Tensor:
    for key in way:
        value = value[key]
    return value


def _cloned(built: Any, wanted: Resolved, x: Batch) -> list[torch.Tensor]:
    kept: dict[int, torch.Tensor] = {}
    built.run(x, lambda index, value: kept.__setitem__(index, value.clone()))
    return [kept[index] for index in range(len(wanted.points))]


def _message(plan: Plan, wanted: Resolved, x: Batch, staging: Staging | None = None) -> bytes:
    form = NativeForm(Extractor.HOOK)
    envelope = Envelope((1 << 31) - 1, form, lambda nbytes: None)
    writer = reply_writer(wanted.outputs, plan, x.size, envelope, staging)
    plan.built.run(x, writer)
    if staging is not None:
        staging.launched().synchronize()
    return publish(writer, form, Timings())


def _sent(message: Way, wanted: Resolved) -> list[torch.Tensor]:
    """Return what is in a message, in the order of the points."""
    sent = zip(wanted.outputs, Features(message()).torch().values(), strict=True)
    of_points = {output.members[0].point: value for output, value in sent}
    return [of_points[index] for index in range(len(wanted.points))]


def _check(
    extractor: Extractor, values: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
) -> None:
    for value, true in zip(values, truth, strict=True):
        compiled = extractor is Extractor.TORCHSCRIPT
        tolerance = compiled_tolerance(true) if compiled else 0.0
        if (error := difference(value.to(true.device), true)) > tolerance:
            raise SystemExit(f"{extractor.name} is wrong by {error:.1e}")
