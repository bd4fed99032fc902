"""Is the gradient of every layer right?

``python tests/coverage/prove_gradients.py --write docs/coverage.md`` asks for the gradient of every
value of every model that the catalogue says can have one, in float64 and float32, and compares it
with that of a reference without in-place modules (``gradient_truths.py``). The models are those of
``gradient_subjects.py``. The rows are kept as JSON, so that a run that is cut goes on.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS / "coverage"), str(TESTS.parent / "server")]

import torch
from gradient_subjects import GradientSubject, classifiers, hugging_face
from gradient_truths import Place, Truth, derivative, find, gradients
from runs import Command

import layertap
from layertap import LocalModel, Objective
from layertap.engine.resolve_objective import gradient_obstacle
from layertap.errors import LayertapError
from layertap.extraction.catalogue import LayerEntry
from layertap.extraction.points import PointKind
from layertap.objective import MAX_TERMS
from layertap.selection import Capture, Extractor
from layertap.settings import Limits

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative to the largest magnitude of a layer's gradient."""

ROUNDING = 16
"""Units of rounding of the model's largest gradient below which an error of a small one is none.

Gradients that cancel out are only the rounding of larger ones. In float64 on a CPU they are equal,
too, and no such allowance is made there.
"""

DIFFERENCE = 5e-3
"""How far the reference may be from a central difference, relative to it."""

STEPS = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2)
"""Steps of these differences; models such as Llama round to float32 inside and need larger ones."""

SAMPLES = 6
"""Layers of each model whose reference is compared with a central difference."""

GROUP_BYTES = 256 << 20
"""Values that are requested at once."""

MOST = 1000
"""Selections that are requested at once."""

NOUNS = {
    "torchvision": "classification models of torchvision",
    "transformers": "architectures of transformers",
}

GROUPS = {"torchvision": classifiers, "transformers": hugging_face}


@dataclass
class Row:
    """What became of one model's gradients.

    Attributes:
        model: Its name.
        group: Where it is from.
        values: How many of its values the catalogue says can have a gradient.
        calls: How many of these are of a second or later call of a module.
        members: How many of these are in a tuple, dict or dataclass.
        never: How many values have none by the catalogue, such as whole numbers.
        right: The right gradients in each dtype.
        rounded: How many of these are right only within ROUNDING, in each dtype.
        refused: Refused gradients by reason, in float64.
        wrong: The wrong ones, with the error.
        checked: The gradients of the reference that a central difference confirmed.
        worst: The largest relative error in each dtype.
        error: Why nothing could be compared.
        seconds: How long it took.
        strict: Whether no float64 gradient was given an allowance for rounding.
    """

    model: str
    group: str
    values: int = 0
    calls: int = 0
    members: int = 0
    never: int = 0
    right: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    checked: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    strict: bool = False


@dataclass(frozen=True)
class Value:
    """A value of the model whose gradient is requested."""

    place: Place
    selection: str
    nbytes: int
    batched: bool


class Weighted(NamedTuple):
    """A result of the model as a part of the score.

    Attributes:
        name: The result's name in the catalogue.
        way: The keys that lead to it in what the model returns.
        value: Its value.
        vector: What it is multiplied by.
    """

    name: str
    way: tuple[str, ...]
    value: torch.Tensor
    vector: torch.Tensor


def prove(subject: GradientSubject, device: str = "cpu") -> Row:
    """Compare every gradient of a model, in both dtypes.

    Args:
        subject: The model and its batch.
        device: What the model and its reference run on, such as ``"cuda"``.
    """
    begun = time.perf_counter()
    row = Row(subject.name, subject.group, strict=device == "cpu")
    for dtype in (torch.float64, torch.float32):
        try:
            with torch.inference_mode(False):
                _Proof(subject, dtype, row, device).run()
        except LayertapError as error:
            row.error = f"{dtype}: {str(error).splitlines()[0]}"
    row.seconds = time.perf_counter() - begun
    return row


class _Proof:
    """The proof of one model in one dtype."""

    def __init__(self, subject: GradientSubject, dtype: torch.dtype, row: Row, device: str) -> None:
        self._subject, self._dtype, self._row = subject, dtype, row
        self._device = device
        self._there = subject.on(device)
        self._name = str(dtype).removeprefix("torch.")
        self._factory = subject.factory(dtype)
        row.right[self._name] = row.rounded[self._name] = 0
        row.worst[self._name] = 0.0

    def _build(self) -> torch.nn.Module:
        return self._factory().to(self._device)

    def run(self) -> None:
        """Ask for everything, and note what came back."""
        # Before it is served: transformers keeps tensors for all models of a kind, and those of a
        # pass in inference mode can't take part in gradients.
        self._pair, self._one = self._results()
        # As a factory that layertap imports by its name.
        sys.modules[__name__].factory = self._factory  # type: ignore[attr-defined]
        given: dict[str, Any] = {}
        if self._subject.item is not None:
            given = {"item_shape": self._subject.item, "input_dtype": self._name}
            if self._subject.batch_of(1, self._dtype).dtype == torch.int64:  # type: ignore[union-attr]
                given["input_dtype"] = "int64"
        limits = Limits(layers=1 << 16, reply_bytes=2047 << 20, pending_bytes=16 << 30)
        source = f"{__name__}:factory"
        with layertap.load(
            source, device=self._device, threads=1, limits=limits, plan_cache="off", **given
        ) as model:
            values = self._values(model)
            for size in (2, 1):
                mine = [value for value in values if value.batched == (size == 2)]
                if mine:
                    self._compare(model, mine, size)

    def _values(self, model: LocalModel) -> list[Value]:
        found: dict[Place, Value] = {}
        never = 0
        for entry in model.host.catalogue:
            for side, point in entry.points.items():
                if point.kind is not PointKind.MODULE:
                    continue
                if gradient_obstacle(entry, side) or entry.refusal(Extractor.HOOK, side):
                    never += 1
                    continue
                place = Place(point.path, side.value, point.call, point.member)
                found.setdefault(place, _value(entry, side, place))
        for spec in model.signature.inputs:
            if spec.dtype.is_floating_point:
                place = Place("", "given", 0, (spec.name,))
                found[place] = Value(place, f"inputs.{spec.name}:gradient", 0, batched=True)
        self._row.values, self._row.never = len(found), never
        self._row.calls = sum(place.call > 0 for place in found)
        self._row.members = sum(bool(place.member) for place in found)
        return list(found.values())

    def _weighted(self, model: LocalModel, size: int) -> list[Weighted]:
        """Return the results that the score is made of, with a random vector for each.

        They are the floating-point ones that the model computes with gradients, and whose items do
        not grow with the batch, as a table of the similarities of all images and all texts does.
        """
        pair, one = self._pair, self._one
        entries = [each for each in model.host.catalogue if each.is_result and each.points]
        found = []
        for entry in entries:
            way = entry.points[Capture.OUTPUT].member
            of_pair, of_one = find(pair, way), find(one, way)
            grows = of_pair.shape[1:] != of_one.shape[1:] or of_pair.shape[:1] != (2,)
            if of_pair.requires_grad and not grows and not gradient_obstacle(entry, Capture.OUTPUT):
                found.append((entry.name, way, of_pair if size == 2 else of_one))
        if not found:
            way = entries[0].points[Capture.OUTPUT].member
            found = [(entries[0].name, way, find(pair if size == 2 else one, way))]
        return [
            Weighted(name, way, value.detach(), _random(value.shape, 5 + index).to(self._dtype))
            for index, (name, way, value) in enumerate(found[:MAX_TERMS])
        ]

    def _results(self) -> tuple[Any, Any]:
        """Return what a module with gradients returns for two items and for one."""
        net = self._build().requires_grad_(True)
        with torch.enable_grad():
            pair, one = (self._there.run(net, rows, self._dtype) for rows in (2, 1))
        return pair, one

    def _compare(self, model: LocalModel, values: Sequence[Value], size: int) -> None:
        dtype = self._dtype
        results = self._weighted(model, size)
        there = [each.vector.to(self._device) for each in results]

        def score(returned: Any) -> torch.Tensor:
            parts = zip(results, there, strict=True)
            return sum((find(returned, each.way) * vector).sum() for each, vector in parts)

        terms = [Objective.dot(each.name, each.vector) for each in results]
        objective = functools.reduce(operator.add, terms)
        for group in _groups(values):
            truth = self._truth([value.place for value in group], score, size)
            for each in results:
                off = (find(truth.result, each.way) - each.value).abs().max()
                if off > TOLERANCE[dtype] * each.value.abs().max():
                    self._row.error = f"the reference returns something else: {float(off):.1e}"
                    return
            if dtype is torch.float64:
                self._confirm(truth, score, size)
            known = [value for value in group if truth.gradients[value.place] is not None]
            self._ask(model, known, objective, truth, size)
            # They are refused one by one, as each refusal ends its request.
            for value in group:
                if truth.gradients[value.place] is None:
                    self._ask(model, [value], objective, truth, size)

    def _truth(self, places: Sequence[Place], score: Any, size: int) -> Truth:
        inputs = [place for place in places if place.side == "given"]
        given = self._there.batch_of(size, self._dtype)
        zeros: dict[Place, torch.Tensor] = {}

        def run(net: torch.nn.Module) -> Any:
            if not inputs:
                return self._there.run(net, size, self._dtype)
            return (
                net(_marked(given, inputs, zeros))
                if isinstance(given, torch.Tensor)
                else net(**_marked(given, inputs, zeros))
            )

        modules = [place for place in places if place.side != "given"]
        truth = gradients(self._build(), run, modules, score)
        if inputs:
            with torch.enable_grad():
                total = score(run(_without_in_place(self._build())))
                found: tuple[torch.Tensor | None, ...] = (None,) * len(zeros)
                if total.requires_grad:
                    found = torch.autograd.grad(total, list(zeros.values()), allow_unused=True)
            truth.gradients.update(zip(zeros, found, strict=True))
        return truth

    def _confirm(self, truth: Truth, score: Any, size: int) -> None:
        """Compare some of the reference's gradients with central differences."""
        known = [
            (place, gradient)
            for place, gradient in truth.gradients.items()
            if gradient is not None and place.side != "given" and gradient.any()
        ]
        generator = torch.Generator().manual_seed(1)
        net = self._build()
        for place, gradient in known[:: max(1, len(known) // SAMPLES)][:SAMPLES]:
            other = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            other = other.to(gradient.device)
            direction = gradient / gradient.norm() + other / other.norm() / 2
            found = []
            for by in STEPS:
                found.append(
                    self._differs(net, place, gradient, score, size, direction=direction, by=by)
                )
                if found[-1][0] <= DIFFERENCE:
                    self._row.checked += 1
                    break
            else:
                if found[-1][1] < DIFFERENCE:  # Otherwise no difference could show it.
                    self._row.wrong.append(
                        f"the reference at {place}: {', '.join(words for _, _, words in found)}"
                    )

    def _differs(
        self,
        net: torch.nn.Module,
        place: Place,
        gradient: torch.Tensor,
        score: Any,
        size: int,
        *,
        direction: torch.Tensor,
        by: float,
    ) -> tuple[float, float, str]:
        """Return how far a central difference is from the reference, its rounding, and both."""
        measured, used, rounding = derivative(
            net,
            lambda net: self._there.run(net, size, self._dtype),
            place,
            score,
            direction,
            by=by,
        )
        expected = float((gradient * used).sum())
        scale = abs(expected) or 1.0
        words = f"{expected:.6e}, by differences {measured:.6e}"
        return abs(measured - expected) / scale, rounding / scale, words

    def _ask(
        self,
        model: LocalModel,
        values: Sequence[Value],
        objective: Objective,
        truth: Truth,
        size: int,
    ) -> None:
        """Ask for gradients at once, or for halves of them if one is refused."""
        if not values:
            return
        given = self._subject.batch_of(size, self._dtype)
        names = [value.selection for value in values]
        try:
            found = model.extract(given, names, objective=objective)
        except LayertapError as error:
            if len(values) == 1:
                self._refused(values[0], str(error), truth)
                return
            half = len(values) // 2
            self._ask(model, values[:half], objective, truth, size)
            self._ask(model, values[half:], objective, truth, size)
            return
        largest = max(float(g.abs().max()) for g in truth.gradients.values() if g is not None)
        for value in values:
            self._judge(value, found[value.selection], truth.gradients[value.place], largest)

    def _judge(
        self,
        value: Value,
        gradient: torch.Tensor,
        expected: torch.Tensor | None,
        largest: float,
    ) -> None:
        row = self._row
        if expected is None:
            row.wrong.append(f"{value.selection}: served, but the score does not depend on it")
            return
        if gradient.shape != expected.shape:
            row.wrong.append(f"{value.selection}: shape {tuple(gradient.shape)}")
            return
        scale = float(expected.abs().max())
        error = float((gradient.to(expected) - expected).abs().max())
        strict = self._dtype is torch.float64 and self._device == "cpu"
        rounding = 0.0 if strict else ROUNDING * torch.finfo(self._dtype).eps * largest
        relative = error / scale if scale else (float("inf") if error else 0.0)
        if relative <= TOLERANCE[self._dtype]:
            row.right[self._name] += 1
            row.worst[self._name] = max(row.worst[self._name], relative)
        elif error <= rounding:
            row.right[self._name] += 1
            row.rounded[self._name] += 1
        else:
            row.wrong.append(f"{value.selection} ({self._name}): {relative:.1e} of {scale:.1e}")

    def _refused(self, value: Value, reason: str, truth: Truth) -> None:
        line = reason.splitlines()[0]
        depends = truth.gradients[value.place] is not None
        kind = "the objective does not depend on it"
        whole = "which has no gradient" in line
        if ("does not depend" in line or whole) is depends:
            # Either way round it is no refusal that a user can trust.
            self._row.wrong.append(f"{value.selection} ({self._name}): refused with {line!r}")
        elif self._dtype is torch.float64:
            kind = line if depends else "it holds whole numbers on this input" if whole else kind
            self._row.refused[kind] = self._row.refused.get(kind, 0) + 1


def _random(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _value(entry: LayerEntry, side: Capture, place: Place) -> Value:
    name = entry.name.replace("\\", "\\\\").replace(":", "\\:").replace("=", "\\=")
    suffix = "gradient" if side is Capture.OUTPUT else "input_gradient"
    spec = entry.specs[side]
    batched = spec.batch_axis is not None
    return Value(place, f"{name}:{suffix}", 2 * spec.bytes_per_item, batched)


def _groups(values: Sequence[Value]) -> list[list[Value]]:
    groups: list[list[Value]] = [[]]
    nbytes = 0
    for value in values:
        if groups[-1] and (nbytes + value.nbytes > GROUP_BYTES or len(groups[-1]) >= MOST):
            groups.append([])
            nbytes = 0
        groups[-1].append(value)
        nbytes += value.nbytes
    return groups


def _marked(given: Any, places: Sequence[Place], zeros: dict[Place, torch.Tensor]) -> Any:
    """Return a batch with a zero added to some of its tensors."""

    def mark(place: Place, tensor: torch.Tensor) -> torch.Tensor:
        zeros[place] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + zeros[place]

    if isinstance(given, torch.Tensor):
        return mark(places[0], given)
    named = {place.member[0]: place for place in places}
    return {
        name: mark(named[name], tensor) if name in named else tensor
        for name, tensor in given.items()
    }


def _without_in_place(net: torch.nn.Module) -> torch.nn.Module:
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return net


HEADER = """## Gradients

The gradient of every value of every model below that the catalogue says can have one: outputs and
inputs of every call of every module, members of tuples, dicts and dataclasses, and the model's own
inputs. The objective is a random vector times the model's result, or the sum of such terms for its
results. Each gradient is held against that of a fresh module without in-place modules, where a zero
was added to the value at the moment at which the module returned it: float64 to 1e-6 and float32 to
1e-4 of the gradient's own largest magnitude. A float32 gradient that is tiny beside the model's
largest one may be off by {units} units of rounding of that{rounded}. In float64, on a CPU, no
gradient is given such an allowance{loose}. The reference
itself was compared with central differences of the unchanged module, which need no autograd, at
{checked} values. Random weights, small inputs, two items. The
experts of Mixtral run in a loop, as PyTorch's grouped product takes no float64, and ViLT takes an
image's patches in order, as it draws another order in each pass. `make test-gradients` writes this
section.

{groups}: {values} values; {right64} gradients right in float64 and {right32} in float32,
**{wrong} wrong**, {refused} refused with the reason.

*calls* are values of a module's second and later calls, *members* those in containers, *no
gradient* those that the catalogue refuses, such as whole numbers; *worst* is the largest error.

"""


def section(rows: Sequence[Row], totals: Mapping[str, int] = MappingProxyType({})) -> str:
    """Return the section of docs/coverage.md.

    Args:
        rows: What became of each model.
        totals: How many models each group has, where some may be missing.
    """
    loose = sum(not row.strict and not row.error for row in rows)
    # Older rows did not count them.
    strict = sum(row.strict and not row.error for row in rows)
    rounded = sum(row.rounded.get("float32", 0) for row in rows if row.strict)
    head = HEADER.format(
        groups=" and ".join(
            f"{sum(row.group == group and not row.error for row in rows)} {noun}"
            + (f" (of {totals[group]})" if group in totals else "")
            for group, noun in NOUNS.items()
        ),
        values=f"{sum(row.values for row in rows):,}",
        right64=f"{sum(row.right.get('float64', 0) for row in rows):,}",
        right32=f"{sum(row.right.get('float32', 0) for row in rows):,}",
        wrong=sum(len(row.wrong) for row in rows),
        units=ROUNDING,
        loose=f"; {loose} rows are older, or from a GPU, and had it in float64 too"
        if loose
        else "",
        rounded=f", as {rounded:,} gradients of {strict} rows are" if strict else "",
        refused=f"{sum(sum(row.refused.values()) for row in rows):,}",
        checked=f"{sum(row.checked for row in rows):,}",
    )
    lines = [
        "| model | values | calls | members | no gradient | float64 | worst | float32 | worst "
        "| refused | wrong |",
        f"| --- |{' --- |' * 10}",
    ]
    for row in sorted(rows, key=lambda each: (each.group != "torchvision", each.model)):
        if row.error:
            lines.append(f"| {row.model} |{' – |' * 9} {row.error} |")
            continue
        refused = "; ".join(f"{count}: {why}" for why, count in row.refused.items()) or "0"
        cells = [row.model, row.values, row.calls, row.members, row.never]
        for name in ("float64", "float32"):
            cells += [row.right.get(name, 0), f"{row.worst.get(name, 0.0):.0e}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {refused} | {len(row.wrong)} |")
    return head + "\n".join(lines) + "\n"


def _words(row: Row) -> str:
    return (
        f"{row.model:32} {row.seconds:6.1f} s  {row.values} values, right {row.right}, rounded "
        f"{row.rounded}, refused {row.refused}, worst {row.worst}, checked {row.checked} "
        f"{row.error} {row.wrong[:5]}"
    )


COMMAND = Command(
    "gradients", __doc__ or "", GROUPS, row=Row, prove=prove, section=section, words=_words
)


if __name__ == "__main__":
    sys.exit(COMMAND.run())
