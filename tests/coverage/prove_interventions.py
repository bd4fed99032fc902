"""Do interventions change what they say, and nothing else?

``python tests/coverage/prove_interventions.py --write docs/coverage.md`` asks that of every model
of ``gradient_subjects.py``. At a spread of its values (first and last ones, those of second calls,
members of tuples, inputs of modules) an intervention that changes nothing must give the bits of a
plain request, and each operation must give the bits of plain PyTorch with forward hooks on a fresh
module (``intervention_truths.py``). For more than ten models, each operation is also requested by
the names of axes (``intervention_cases.py``).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS / "coverage"), str(TESTS.parent / "server")]

import intervention_truths as truths
import torch
from gradient_subjects import GradientSubject, classifiers, hugging_face
from gradient_truths import Place
from intervention_cases import SITES, NamedSite, own
from intervention_truths import Edit, Part, Pass, same_bits
from runs import Command

import layertap
from layertap import Intervention, LocalFeatures, LocalModel
from layertap.errors import LayertapError
from layertap.extraction.catalogue import LayerEntry
from layertap.extraction.points import PointKind
from layertap.selection import Capture, Extractor
from layertap.settings import Limits

SUMS = 1e-5
"""How far values may be behind an operation that adds up, relative to their largest magnitude."""

NORMS = 1e-4
"""How far the norms in the reply, sums in float32, may be, relative to the true ones."""

OVERFLOW = math.sqrt(torch.finfo(torch.float32).max)
"""Norms from here on are infinite in the reply, as their squares overflow in float32."""

SPREAD: Mapping[str, int] = {"outputs": 6, "calls": 3, "members": 3, "inputs": 3}
"""How many values of each kind are changed in each model."""

NOUNS = {
    "torchvision": "classification models of torchvision",
    "transformers": "architectures of transformers",
    "own": "nets of the tests",
}

GROUPS = {"torchvision": classifiers, "transformers": hugging_face, "own": own}


@dataclass
class Row:
    """What became of one model's interventions.

    Attributes:
        model: Its name.
        group: Where it is from.
        values: How many of its values the catalogue says can be changed.
        sites: How many of these were changed here.
        calls: How many of the sites are of a second or later call of a module.
        members: How many are in a tuple, list, dict or dataclass.
        inputs: How many are what a module was given.
        identical: The sites at which interventions that change nothing gave the bits of a plain
            request.
        moved: The other sites, where plain PyTorch has other bits once a copy takes the place; they
            gave those bits.
        replies: The values of replies that were compared with a fresh module's.
        right: For each operation, the sites where all of a reply was right.
        named: The same for operations by the names of axes.
        refused: Refused sites by reason; the reason was confirmed with a fresh module.
        wrong: What was wrong.
        worst: The largest error behind an operation that adds up.
        error: Why nothing could be compared.
        seconds: How long it took.
    """

    model: str
    group: str
    values: int = 0
    sites: int = 0
    calls: int = 0
    members: int = 0
    inputs: int = 0
    identical: int = 0
    moved: int = 0
    replies: int = 0
    right: dict[str, int] = field(default_factory=dict)
    named: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    worst: float = 0.0
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Site:
    """A value of the model that is changed or read.

    Attributes:
        name: The layer's name.
        place: Where it is.
        axis: The dimension of the items; None if the value is that of the only item.
        per_item: The elements of an item along it.
    """

    name: str
    place: Place
    axis: int | None
    per_item: int

    @property
    def selection(self) -> str:
        """Return the text that requests it."""
        name = self.name.replace("\\", "\\\\").replace(":", "\\:").replace("=", "\\=")
        return f"{name}:input" if self.place.side == "input" else name

    def items(self, value: torch.Tensor) -> torch.Tensor:
        """Return the value as ``[items, ...]``."""
        if self.axis is None:
            return value[None]
        first = value.movedim(self.axis, 0)
        return first.unflatten(0, (-1, self.per_item)) if self.per_item > 1 else first

    def of(self, value: torch.Tensor, size: int) -> Site:
        """Return the site in a batch whose items have other sizes than the catalogue's."""
        if self.axis is None:
            return self
        return replace(self, per_item=value.shape[self.axis] // size)

    def whole(self) -> Part:
        """Return the whole value as a part."""
        return Part(self.axis)

    def item(self, index: int, size: int) -> Part:
        """Return the part of one item."""
        if self.axis is None:
            return self.whole()
        first = index * self.per_item
        return Part(self.axis, rows=range(first, first + self.per_item))


class Asked(NamedTuple):
    """An intervention, and what it must do.

    Attributes:
        intervention: The intervention.
        edit: What a fresh module's hook does for it.
    """

    intervention: Intervention
    edit: Edit


def prove(subject: GradientSubject, device: str = "cpu") -> Row:
    """Try interventions on a model.

    Args:
        subject: The model and its batch.
        device: What the model runs on; the reference runs on the CPU, so it must be that.

    Raises:
        ValueError: For another device, whose bits are others.
    """
    if device != "cpu":
        raise ValueError(f"device: got {device!r}, expected cpu: the reference runs there")
    begun = time.perf_counter()
    row = Row(subject.name, subject.group)
    try:
        _Proof(subject, row).run()
    except LayertapError as error:
        row.error = str(error).splitlines()[0]
    row.seconds = time.perf_counter() - begun
    return row


class _Proof:
    """The proof of one model."""

    def __init__(self, subject: GradientSubject, row: Row) -> None:
        self._subject, self._row = subject, row
        self._build = subject.factory(torch.float32)
        self._net = self._build()  # The reference's own.

    def run(self) -> None:
        """Try everything."""
        # As a factory that layertap imports by its name.
        sys.modules[__name__].factory = self._build  # type: ignore[attr-defined]
        given: dict[str, Any] = {}
        if self._subject.item is not None:
            whole = self._batch(1)
            assert isinstance(whole, torch.Tensor)
            dtype = str(whole.dtype).removeprefix("torch.")
            given = {"item_shape": self._subject.item, "input_dtype": dtype}
        limits = Limits(layers=1 << 16, reply_bytes=2047 << 20, pending_bytes=16 << 30)
        source = f"{__name__}:factory"
        with layertap.load(
            source, device="cpu", threads=1, limits=limits, plan_cache="off", **given
        ) as model:
            found = list(_changeable(model))
            chosen = _spread(found)
            row = self._row
            row.values, row.sites = len(found), len(chosen)
            row.calls = sum(site.place.call > 0 for site in chosen)
            row.members = sum(bool(site.place.member) for site in chosen)
            row.inputs = sum(site.place.side == "input" for site in chosen)
            results = [site for site in found if site.place.path == "" and _is_output(site)]
            for size in (2, 1):
                mine = [site for site in chosen if (site.axis is not None) == (size == 2)]
                if mine:
                    read = [site for site in results if size == 1 or site.axis is not None]
                    self._everywhere(model, mine, list(dict.fromkeys([*mine, *read])), size)
            for named in SITES.get(self._subject.name, ()):
                self._by_name(model, named, results)

    def _batch(self, size: int) -> Any:
        return self._subject.batch_of(size, torch.float32)

    def _truth(self, read: Sequence[Site], edits: Mapping[Place, Edit], size: int) -> Pass:
        return truths.run(
            self._net,
            lambda net: self._subject.run(net, size, torch.float32),
            [site.place for site in read],
            edits,
        )

    def _everywhere(
        self, model: LocalModel, sites: Sequence[Site], read: Sequence[Site], size: int
    ) -> None:
        """Change all sites at once: by nothing, and by each of the operations."""
        plain = model.extract(self._batch(size), _names(read), extractor="hook")
        truth = self._truth(read, {}, size)
        for site in read:
            if not same_bits(plain[site.selection], truth.values[site.place]):
                again = self._truth([site], {}, size).values[site.place]
                draws = not same_bits(again, truth.values[site.place])
                self._row.error = (
                    "it draws random numbers, so no two passes are equal"
                    if draws
                    else f"a plain request for {site.selection} has other bits"
                )
                return
        sites = [site.of(truth.values[site.place], size) for site in sites]
        able = self._able(model, sites, read, size)
        moved = self._moved(able, read, truth, size)
        steady = [site for site in able if site not in moved]
        # Those that move others are tried one by one, as the others' own values are plain ones.
        for group, bits in ((steady, plain), *(((site,), None) for site in moved)):
            good = True
            for kind, make in IDENTITIES.items():
                asked = {site: make(site, truth.values[site.place], size) for site in group}
                words = f"identity by {kind}"
                good &= self._check(model, asked, read, size, kind=words, plain=bits)
            if good and bits is not None:
                self._row.identical += len(group)
            elif good:
                self._row.moved += len(group)
        for turn in range(len(OPERATIONS)):
            asked, kinds = {}, {}
            for index, site in enumerate(able):
                kind, make = list(OPERATIONS.items())[(index + turn) % len(OPERATIONS)]
                asked[site], kinds[site] = make(site, truth.values[site.place], size), kind
            good = self._check(model, asked, read, size, kind=f"turn {turn}")
            for site in able if good else ():
                self._row.right[kinds[site]] = self._row.right.get(kinds[site], 0) + 1

    def _moved(
        self, sites: Sequence[Site], read: Sequence[Site], plain: Pass, size: int
    ) -> list[Site]:
        """Return the sites at which plain PyTorch has other bits once a copy takes the place.

        ``nn.MultiheadAttention`` asks whether its query is its key, the same tensor.
        """

        def differs(copied: Sequence[Site]) -> bool:
            edits = {site.place: Edit(site.whole(), _same) for site in copied}
            found = self._truth(read, edits, size).values
            return not all(same_bits(found[place], plain.values[place]) for place in found)

        return [site for site in sites if differs([site])] if differs(sites) else []

    def _able(
        self, model: LocalModel, sites: Sequence[Site], read: Sequence[Site], size: int
    ) -> list[Site]:
        """Return the sites at which interventions are not refused; judge the other refusals."""
        scaled = [Intervention.scale(site.name, 1.0) for site in sites]
        try:
            model.extract(self._batch(size), _names(read), interventions=_sided(sites, scaled))
        except LayertapError as error:
            if len(sites) == 1:
                self._refused(sites[0], str(error).splitlines()[0], read, size)
                return []
            half = len(sites) // 2
            parts = (sites[:half], sites[half:])
            return [site for part in parts for site in self._able(model, part, read, size)]
        return list(sites)

    def _refused(self, site: Site, line: str, read: Sequence[Site], size: int) -> None:
        """Count a refusal if a fresh module shows that its reason is true."""
        plain = self._truth(read, {}, size).values

        def differs(change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
            edits = {site.place: Edit(site.whole(), change)}
            others = [each for each in read if each.place != site.place]
            try:
                found = self._truth(others, edits, size).values
            except RuntimeError:
                return True
            return not all(same_bits(found[each], plain[each]) for each in found)

        true = {
            "go on with a copy": lambda: differs(_same),
            "floating-point values can be changed": lambda: (
                not plain[site.place].is_floating_point()
            ),
        }
        reason = next((words for words in true if words in line), "")
        if not reason or not true[reason]():
            self._row.wrong.append(f"{site.selection}: refused with {line!r}")
            return
        whole = "it holds whole numbers on this input"
        kind = whole if "floating" in reason else "the model needs its own memory"
        self._row.refused[kind] = self._row.refused.get(kind, 0) + 1

    def _check(
        self,
        model: LocalModel,
        asked: Mapping[Site, Asked],
        read: Sequence[Site],
        size: int,
        *,
        kind: str,
        plain: LocalFeatures | None = None,
        sums: bool = False,
    ) -> bool:
        """Request interventions, and compare the whole reply with a fresh module's pass."""
        if not asked:
            return True
        before = len(self._row.wrong)
        truth = self._truth(read, {site.place: each.edit for site, each in asked.items()}, size)
        given = _sided(list(asked), [each.intervention for each in asked.values()])
        found = model.extract(self._batch(size), _names(read), interventions=given)
        for site in read:
            reply, expected = found[site.selection], truth.values[site.place]
            self._row.replies += 1
            if plain is not None and not same_bits(reply, plain[site.selection]):
                self._row.wrong.append(f"{kind}: {site.selection} has other bits than without")
            if not sums and not same_bits(reply, expected):
                self._row.wrong.append(f"{kind}: {site.selection} {_far(reply, expected):.1e}")
            elif sums:
                far = _far(reply, expected)
                self._row.worst = max(self._row.worst, far)
                if not far <= SUMS:
                    self._row.wrong.append(f"{kind}: {site.selection} {far:.1e}")
        self._report(kind, found, [(site, truth.done[site.place]) for site in asked], sums=sums)
        if found.extractor is not Extractor.HOOK:
            self._row.wrong.append(f"{kind}: served by {found.extractor}")
        return len(self._row.wrong) == before

    def _report(
        self,
        kind: str,
        found: LocalFeatures,
        done: Sequence[tuple[Site, truths.Done]],
        *,
        sums: bool,
    ) -> None:
        """Compare what the reply tells about each intervention with what it did."""
        calls, elements, changed, norms = (
            found[f"interventions.{name}"].tolist()
            for name in ("calls", "elements", "changed", "norm")
        )
        for index, (site, true) in enumerate(done):
            told = (calls[index], elements[index], *(() if sums else (changed[index],)))
            expected = (1, true.elements, *(() if sums else (true.changed,)))
            if told != expected:
                self._row.wrong.append(f"{kind}: {site.selection}: told {told}, not {expected}")
            for one, other in zip(norms[index], true.norms, strict=True):
                same = math.isclose(one, other, rel_tol=NORMS, abs_tol=1e-18)
                same |= math.isnan(one) and math.isnan(other)
                same |= math.isinf(one) and other >= OVERFLOW
                if not same:
                    self._row.wrong.append(f"{kind}: {site.selection}: norm {one}, not {other}")

    def _by_name(self, model: LocalModel, named: NamedSite, results: Sequence[Site]) -> None:
        """Apply each operation to a layer whose dimensions are named by hand."""
        entry = model.host.catalogue.entries[named.layer]
        site = _site(entry, Capture.OUTPUT)
        if site.axis != named.items:
            self._row.wrong.append(f"{named.layer}: items in {site.axis}, not {named.items}")
            return
        read = list(dict.fromkeys([site, *(each for each in results if each.axis is not None)]))
        truth = self._truth([site], {}, 2).values[site.place]
        for kind, asked in _named_operations(named, truth):
            word = asked.intervention.operation
            sums = word in ("mean", "project_out", "project_keep", "cap")
            if self._check(model, {site: asked}, read, 2, kind=kind, sums=sums):
                self._row.named[word] = self._row.named.get(word, 0) + 1


def _far(reply: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error, relative to the largest magnitude."""
    if reply.shape != expected.shape:
        return math.inf
    if same_bits(reply, expected):
        return 0.0
    scale = float(expected.abs().max()) or 1.0
    return float((reply.double() - expected.double()).abs().max()) / scale


def _changeable(model: LocalModel) -> Iterator[Site]:
    """Yield the floating-point values of modules that HOOK serves and the model goes on with."""
    seen = set()
    for entry in model.host.catalogue:
        # Attention weights that are computed for captures only: the model does not go on with them.
        if entry.same_as or entry.kind is not PointKind.MODULE or not entry.is_used:
            continue
        for side in (Capture.INPUT, Capture.OUTPUT):
            spec = entry.specs.get(side)
            if spec is None or spec.quantized or not spec.dtype.is_floating_point:
                continue
            site = None if entry.refusal(Extractor.HOOK, side) else _site(entry, side)
            if site is not None and site.place not in seen:
                seen.add(site.place)
                yield site


def _site(entry: LayerEntry, side: Capture) -> Site:
    point, axis = entry.points[side], entry.specs[side].batch_axis
    place = Place(point.path, side.value, point.call, point.member)
    if entry.specs[side].dynamic or axis is None:
        return Site(entry.name, place, None, 1)
    return Site(entry.name, place, *axis)


def _is_output(site: Site) -> bool:
    return site.place.side == "output"


def _spread(found: Sequence[Site]) -> list[Site]:
    """Return some values of each kind, the first and the last of each among them."""
    kinds: dict[str, list[Site]] = {
        "outputs": [site for site in found if _is_output(site)],
        "calls": [site for site in found if site.place.call and _is_output(site)],
        "members": [site for site in found if site.place.member and site.place.path],
        "inputs": [site for site in found if not _is_output(site)],
    }
    chosen: dict[Site, None] = {}
    for kind, sites in kinds.items():
        count = min(SPREAD[kind], len(sites))
        for index in range(count):
            chosen[sites[index * (len(sites) - 1) // max(1, count - 1)]] = None
    order = {site: index for index, site in enumerate(found)}
    return sorted(chosen, key=lambda site: order[site])


def _names(sites: Sequence[Site]) -> list[str]:
    return [site.selection for site in sites]


def _sided(sites: Sequence[Site], given: Sequence[Intervention]) -> list[Intervention]:
    """Return the interventions, on the inputs of layers for sites that are inputs."""
    return [
        one.of_input() if site.place.side == "input" else one
        for site, one in zip(sites, given, strict=True)
    ]


Make = Callable[[Site, torch.Tensor, int], Asked]
"""Makes an intervention at a site, given its value without any, and the number of items."""


def _same(part: torch.Tensor) -> torch.Tensor:
    return part


IDENTITIES: Mapping[str, Make] = {
    "scale": lambda s, v, n: Asked(Intervention.scale(s.name, 1.0), Edit(s.whole(), _same)),
    # -0.0 and not 0.0, which would turn a -0.0 into a 0.0.
    "add": lambda s, v, n: Asked(
        Intervention.add(s.name, -1.0, factor=0.0), Edit(s.whole(), _same)
    ),
    "replace": lambda s, v, n: Asked(
        Intervention.replace(s.name, s.items(v).numpy()), Edit(s.whole(), _same)
    ),
    "patch": lambda s, v, n: Asked(
        Intervention.patch(s.name, 0, item=0), Edit(s.item(0, n), _same)
    ),
    "clamp": lambda s, v, n: Asked(
        Intervention.clamp(s.name, low=-math.inf, high=math.inf), Edit(s.whole(), _same)
    ),
}
"""Interventions that change nothing."""


def _zero_first(site: Site, value: torch.Tensor, size: int) -> Asked:
    """Zero the first index of the last dimension."""
    last = value.dim() - 1
    if value.dim() < 2 or site.axis == last:
        return Asked(Intervention.zero(site.name), Edit(site.whole(), truths.set_to(0.0)))
    dim = site.items(value).dim() - 2
    part = Part(site.axis, {last: [0]})
    return Asked(Intervention.zero(site.name, dims={dim: 0}), Edit(part, truths.set_to(0.0)))


def _replaced(site: Site, value: torch.Tensor, size: int) -> Asked:
    other = torch.randn(value.shape, generator=torch.Generator().manual_seed(4))
    return Asked(
        Intervention.replace(site.name, site.items(other).numpy()),
        Edit(site.whole(), truths.replace(other)),
    )


def _patched(site: Site, value: torch.Tensor, size: int) -> Asked:
    source = size - 1
    return Asked(
        Intervention.patch(site.name, source, item=0),
        Edit(site.item(0, size), source=site.item(source, size)),
    )


def _noisy(site: Site, value: torch.Tensor, size: int) -> Asked:
    """Add noise to all items: the same for each of them, drawn in the shape of an item."""
    drawn = torch.randn(
        site.items(value).shape[1:], generator=torch.Generator().manual_seed(6)
    ).expand(site.items(value).shape)
    if site.axis is None:
        whole = drawn[0]
    else:
        merged = drawn.flatten(0, 1) if site.per_item > 1 else drawn
        whole = merged.movedim(0, site.axis)
    return Asked(
        Intervention.noise(site.name, 0.125, seed=6),
        Edit(site.whole(), lambda part: part + whole * 0.125),
    )


OPERATIONS: Mapping[str, Make] = {
    "scale": lambda s, v, n: Asked(
        Intervention.scale(s.name, -0.5, item=n - 1), Edit(s.item(n - 1, n), truths.scale(-0.5))
    ),
    "zero": _zero_first,
    "set": lambda s, v, n: Asked(
        Intervention.set_to(s.name, 0.75, item=0), Edit(s.item(0, n), truths.set_to(0.75))
    ),
    "add": lambda s, v, n: Asked(
        Intervention.add(s.name, 0.3, factor=0.7),
        Edit(s.whole(), truths.add(torch.tensor(0.3), 0.7)),
    ),
    "replace": _replaced,
    "patch": _patched,
    "clamp": lambda s, v, n: Asked(
        Intervention.clamp(s.name, low=-0.1, high=0.4), Edit(s.whole(), truths.clamp(-0.1, 0.4))
    ),
    "noise": _noisy,
}
"""Operations whose numbers do not depend on the order of a sum."""


def _named_operations(named: NamedSite, value: torch.Tensor) -> Iterator[tuple[str, Asked]]:
    """Yield each operation on a part by the names of its axes, with its name."""
    axes, items, layer = named.axes, named.items, named.layer
    by_number = {f"dim{dim - (dim > items)}": dim for dim in range(value.dim()) if dim != items}
    shape = value.shape

    def part(rows: Sequence[int] | None = None, **indices: Sequence[int]) -> tuple[dict, Part]:
        """Return the arguments that select a part, and the part."""
        known = axes or by_number
        there = {known[name]: sorted(i % shape[known[name]] for i in each)
                 for name, each in indices.items()}  # fmt: skip
        where: dict[str, Any] = {} if rows is None else {"item": list(rows)}
        if axes:
            where.update({name: list(each) for name, each in indices.items()})
        else:
            where["dims"] = {int(name[3:]): list(each) for name, each in indices.items()}
        return where, Part(items, there, rows)

    def asked(make: Any, edit: Edit, *given: Any, where: Mapping[str, Any], **more: Any) -> Asked:
        return Asked(make(layer, *given, **more, **where), edit)

    last = "channel" if axes else list(by_number)[-1]
    first = next(name for name in (axes or by_number) if name != last)
    dims = axes or by_number
    channels, others = shape[dims[last]], shape[dims[first]]
    few = [0, channels - 1]
    edge = [0, others - 1]
    drawn = torch.randn(channels, generator=torch.Generator().manual_seed(8))

    where, some = part(**{last: [0, -1]})
    yield f"zero {last}", asked(Intervention.zero, Edit(some, truths.set_to(0.0)), where=where)
    where, some = part([1], **{last: few, first: edge})
    yield (
        f"set {last}, {first}",
        asked(Intervention.set_to, Edit(some, truths.set_to(-1.5)), -1.5, where=where),
    )
    where, some = part(**{first: [-1]})
    yield (
        f"scale {first}",
        asked(Intervention.scale, Edit(some, truths.scale(1.75)), 1.75, where=where),
    )
    over = [name for name in axes if name != last] or [int(first[3:])]
    over_dims = [dims[name] for name in axes if name != last] or [dims[first]]
    where, some = part(**{last: few})
    yield (
        f"mean over {over}",
        asked(Intervention.mean, Edit(some, truths.mean(over_dims)), over, where=where),
    )
    yield (
        "mean over item",
        asked(Intervention.mean, Edit(some, truths.mean([items])), "item", where=where),
    )
    where, some = part([0], **{last: range(channels // 2)})
    _, there = part([1], **{last: range(channels // 2)})
    yield "patch", asked(Intervention.patch, Edit(some, source=there), 1, where=where)
    where, some = part([1], **{first: edge})
    along = [-1 if dim == dims[last] else 1 for dim in range(value.dim())]
    vector = drawn.reshape(along)
    if axes:
        yield (
            "add a vector",
            asked(
                Intervention.add,
                Edit(some, truths.add(vector, 0.5)),
                drawn,
                where=where,
                factor=0.5,
            ),
        )
    else:
        yield "add a number", asked(
            Intervention.add, Edit(some, truths.add(torch.tensor(0.25), 3.0)), 0.25,
            where=where, factor=3.0,
        )  # fmt: skip
    where, some = part(**{last: few, first: edge})
    old = some.read(value)
    new = torch.randn(old.shape, generator=torch.Generator().manual_seed(9))
    yield (
        "replace",
        asked(
            Intervention.replace,
            Edit(some, truths.replace(new)),
            new.movedim(items, 0),
            where=where,
        ),
    )
    yield (
        "clamp",
        asked(
            Intervention.clamp, Edit(some, truths.clamp(-0.2, 0.1)), where=where, low=-0.2, high=0.1
        ),
    )
    yield (
        "noise",
        asked(
            Intervention.noise, Edit(some, truths.noise(items, 0.5, 11)), 0.5, where=where, seed=11
        ),
    )
    if axes:
        where, some = part(**{first: edge})
        dim = dims[last]
        yield (
            "project_out",
            asked(
                Intervention.project_out,
                Edit(some, truths.project_out(drawn, dim)),
                drawn,
                where=where,
            ),
        )
        yield "project_keep", asked(
            Intervention.project_keep, Edit(some, truths.project_keep(drawn, dim)), drawn,
            where=where,
        )  # fmt: skip
        yield "cap", asked(
            Intervention.cap, Edit(some, truths.cap(drawn, dim, -0.1, 0.2)), drawn,
            where=where, low=-0.1, high=0.2,
        )  # fmt: skip
    if named.heads:
        each = channels // named.heads
        mine = [head * each + place for head in (0, 2) for place in range(each)]
        edit = Edit(Part(items, {dims[last]: mine}), truths.set_to(0.0))
        yield (
            "zero heads",
            asked(Intervention.zero, edit, where={"head": [0, 2], "heads": named.heads}),
        )
    if named.grid is not None:
        rows, columns = named.grid
        tokens = [1 + row * columns + column for row in (1, rows - 1) for column in (0, 2)]
        edit = Edit(Part(items, {dims["token"]: tokens}), truths.scale(2.0))
        yield (
            "scale patches",
            asked(Intervention.scale, edit, 2.0, where={"y": [1, -1], "x": [0, 2]}),
        )
    if named.skips:
        where, some = part([1])
        yield "skip", asked(Intervention.skip, Edit(some, skips=True), where=where)


HEADER = """## Interventions

At {sites} values of the models below (at most {most} of each model: first, last and between, second
calls, members of containers, inputs of modules), five interventions that change nothing were
requested: scaled by 1, zero added, replaced by its own value, patched from the same item, and
clamped to everything. Every value of every reply has the bits of a plain request, or, at {moved} of
the values, those that plain PyTorch has with a copy there, as `nn.MultiheadAttention` computes in
another way unless its query and its key are one tensor. Then each of {kinds}
was requested at each of these values, and every value of the reply, and what it tells about calls,
elements, changed elements and norms, was held against forward hooks of plain PyTorch on a fresh
module, bit for bit. Random weights, small inputs, two items. `make test-interventions` writes
this section.

{groups}: {identical} of {sites} values had the bits of a plain request; {right} operations right,
**{wrong} wrong**, {refused} values refused with the reason; {replies} values of replies
compared.

"""

NAMED = """
### By the names of axes

Each operation on layers of {count} kinds of model, whose dimensions are named by hand: channels,
rows, columns, tokens, heads, patches and items. A number is how many requests were right in all of
their values: bit for bit, and within {sums:.0e} of the largest magnitude for operations that add
up, where the order of a sum shows (at most {worst:.0e}).

"""


def section(rows: Sequence[Row], totals: Mapping[str, int] = MappingProxyType({})) -> str:
    """Return the section of docs/coverage.md.

    Args:
        rows: What became of each model.
        totals: How many models each group has, where some may be missing.
    """
    head = HEADER.format(
        most=sum(SPREAD.values()),
        kinds=", ".join(f"`{kind}`" for kind in OPERATIONS),
        groups=", ".join(
            f"{sum(row.group == group and not row.error for row in rows)} {noun}"
            + (f" (of {totals[group]})" if group in totals else "")
            for group, noun in NOUNS.items()
        ),
        sites=f"{sum(row.sites for row in rows if not row.error):,}",
        moved=sum(row.moved for row in rows),
        identical=f"{sum(row.identical for row in rows):,}",
        right=f"{sum(sum(row.right.values()) for row in rows):,}",
        wrong=sum(len(row.wrong) for row in rows),
        refused=sum(sum(row.refused.values()) for row in rows),
        replies=f"{sum(row.replies for row in rows):,}",
    )
    lines = [
        "| model | values | changed here | second calls | members | inputs | same bits "
        "| a copy's bits | operations | refused | wrong |",
        f"| --- |{' --- |' * 10}",
    ]
    for row in sorted(rows, key=lambda each: (list(NOUNS).index(each.group), each.model)):
        if row.error:
            lines.append(f"| {row.model} |{' – |' * 9} {row.error} |")
            continue
        refused = "; ".join(f"{count}: {why}" for why, count in row.refused.items()) or "0"
        cells = [
            row.model, row.values, row.sites, row.calls, row.members, row.inputs, row.identical,
            row.moved, sum(row.right.values()), refused, len(row.wrong),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return head + "\n".join(lines) + "\n" + _named_section(rows)


def _named_section(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.named]
    if not rows:
        return ""
    kinds = sorted({kind for row in rows for kind in row.named})
    head = NAMED.format(count=len(rows), sums=SUMS, worst=max(row.worst for row in rows))
    lines = [f"| operation | {' | '.join(row.model for row in rows)} |"]
    lines.append(f"| --- |{' --- |' * len(rows)}")
    for kind in kinds:
        cells = [str(row.named.get(kind, "–")) for row in rows]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return head + "\n".join(lines) + "\n"


def _words(row: Row) -> str:
    return (
        f"{row.model:32} {row.seconds:6.1f} s  {row.sites} of {row.values} values, identical "
        f"{row.identical}, moved {row.moved}, right {sum(row.right.values())}, named "
        f"{sum(row.named.values())}, refused {row.refused}, worst {row.worst:.0e} {row.error} "
        f"{row.wrong[:5]}"
    )


COMMAND = Command(
    "interventions", __doc__ or "", GROUPS, row=Row, prove=prove, section=section, words=_words
)


if __name__ == "__main__":
    sys.exit(COMMAND.run())
