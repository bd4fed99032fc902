"""Does EXPORT return what the module returned, for every layer of every model that it claims?

``make test-export`` asks that of all models of the first section of docs/coverage.md. A package
takes a minute to many, so the rows are kept, and a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import prove
from runs import Command
from subjects import TIMM, torchvision_models

from layertap.engine.contest import Entrant
from layertap.selection import Extractor

__all__ = ["COMMAND", "Named", "Row", "prove_export", "section"]

_EXPORT = Entrant(Extractor.EXPORT)


@dataclass(frozen=True)
class Named:
    """A model under proof.

    Attributes:
        name: Its source, such as ``"timm:levit_128s"``.
        group: ``"torchvision"`` or ``"timm"``.
    """

    name: str
    group: str


@dataclass
class Row:
    """What became of one model.

    Attributes:
        model: Its source.
        group: Where it is from.
        item: The sizes of an item.
        layers: Modules that run.
        values: The outputs, inputs and nodes that were compared.
        right: Layers whose output was right.
        refused: Layers that the catalogue refuses, by the reason.
        unbuilt: Why packages were refused when they were built.
        wrong: What was wrong; a server would find it and refuse the package.
        error: Why nothing could be compared.
        seconds: How long it took.
    """

    model: str
    group: str
    item: list[int] = field(default_factory=list)
    layers: int = 0
    values: int = 0
    right: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    unbuilt: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


def prove_export(subject: Named, device: str) -> Row:
    """Compare EXPORT's values for all layers of a model with those of cloning hooks."""
    found = prove.quietly(subject.name, device, (_EXPORT,))
    row = Row(subject.name, subject.group, list(found.item_shape), found.layers)
    row.error = found.error
    row.seconds = round(found.seconds, 1)
    if not row.error:
        tally = found.tallies[_EXPORT]
        row.values, row.right, row.wrong = tally.compared, tally.right, tally.off
        row.refused = dict(Counter(tally.reasons))
        row.unbuilt = tally.unbuilt
    return row


HEADER = """## Packages of EXPORT

Every layer of every model above, by EXPORT, held against cloning hooks within the tolerance for
compiled plans. All layers of a model are one package (several where their values are over 3 GiB)
that is compiled for any number of items and run with two. A server would refuse a package with a
wrong value, as it compares each one before it serves; here wrong values are counted. Random
weights, the smallest of a few input sizes that the model takes. `make test-export` writes this
section.

{groups}: {values} values compared, {right} layers right, **{wrong} wrong**.

*refused* are layers that the catalogue refuses, with the reason, and packages that could not be
built, for the reason that a request would be told.

"""


def section(rows: Sequence[Row], totals: Mapping[str, int]) -> str:
    """Return the section of docs/coverage.md.

    Args:
        rows: What became of each model.
        totals: How many models each group has, where some may be missing.
    """
    head = HEADER.format(
        groups=" and ".join(
            f"{sum(row.group == group and not row.error for row in rows)} models of {group}"
            + (f" (of {totals[group]})" if group in totals else "")
            for group in GROUPS
        ),
        values=f"{sum(row.values for row in rows):,}",
        right=f"{sum(row.right for row in rows):,}",
        wrong=sum(len(row.wrong) for row in rows),
    )
    lines = ["| model | item | layers | right | refused | wrong |", f"| --- |{' --- |' * 5}"]
    for row in sorted(rows, key=lambda each: (each.group == "timm", each.model)):
        if row.error:
            lines.append(f"| {row.model} |{' – |' * 4} {row.error} |")
            continue
        reasons = [f"{count}: {why}" for why, count in row.refused.items()]
        refused = "; ".join([*reasons, *row.unbuilt]) or "0"
        item = "×".join(map(str, row.item))
        cells = [row.model, item, row.layers, row.right, refused, len(row.wrong)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return head + "\n".join(lines) + "\n"


def _words(row: Row) -> str:
    return (
        f"{row.model:36} {row.seconds:6.1f} s  {row.right} of {row.layers} layers right, "
        f"{row.values} values, refused {row.refused} {row.unbuilt} {row.error} {row.wrong[:3]}"
    )


def _of_torchvision() -> list[Named]:
    return [Named(name, "torchvision") for name in torchvision_models()]


def _of_timm() -> list[Named]:
    return [Named(f"timm:{name}", "timm") for name in TIMM]


GROUPS = {"torchvision": _of_torchvision, "timm": _of_timm}

COMMAND = Command(
    "export", __doc__ or "", GROUPS, row=Row, prove=prove_export, section=section, words=_words
)


if __name__ == "__main__":
    sys.exit(COMMAND.run())
