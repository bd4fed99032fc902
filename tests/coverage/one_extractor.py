"""A proof of one extractor: does it return what the module returned, for every layer of a model?

All models of the first section of docs/coverage.md are asked. The rows are kept, and a run that was
cut goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import prove
from runs import Command
from subjects import TIMM, torchvision_models

from layertap.engine.contest import Entrant

__all__ = ["Named", "Row", "command", "prove_layers", "section"]


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


def prove_layers(entrant: Entrant, subject: Named, device: str) -> Row:
    """Compare an extractor's values for all layers of a model with those of cloning hooks."""
    found = prove.quietly(subject.name, device, (entrant,))
    row = Row(subject.name, subject.group, list(found.item_shape), found.layers)
    row.error = found.error
    row.seconds = round(found.seconds, 1)
    if not row.error:
        tally = found.tallies[entrant]
        row.values, row.right, row.wrong = tally.compared, tally.right, tally.off
        row.refused = dict(Counter(tally.reasons))
        row.unbuilt = tally.unbuilt
    return row


def section(header: str, rows: Sequence[Row], totals: Mapping[str, int]) -> str:
    """Return the section of docs/coverage.md.

    Args:
        header: Its text before the table, with the fields ``groups``, ``values``, ``right`` and
            ``wrong``.
        rows: What became of each model.
        totals: How many models each group has, where some may be missing.
    """
    head = header.format(
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


def command(name: str, about: str, entrant: Entrant, header: str) -> Command[Row, Named]:
    """Return the proof of an extractor as a command.

    Args:
        name: The name of its section of docs/coverage.md.
        about: What it does, for ``--help``.
        entrant: The extractor, and how its program is finished.
        header: See ``section``.
    """
    return Command(
        name,
        about,
        GROUPS,
        row=Row,
        prove=partial(prove_layers, entrant),
        section=partial(section, header),
        words=_words,
    )
