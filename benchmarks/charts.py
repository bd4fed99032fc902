"""Charts: bars of what each row of a benchmark costs, and lines over time or load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["bars", "curves", "digits", "lines", "timeline"]

Panels = dict[str, dict[str, float]]


def digits(number: float) -> str:
    """Return a number with three digits that count, a large one whole."""
    places = next((n for n, least in enumerate((100, 10, 1, 0.1)) if number >= least), 4)
    return f"{number:.{places}f}"


def bars(file: Path, panels: Panels, unit: str = "ms") -> None:
    """Draw figures of a unit by panel and row into a PNG file.

    Each panel has a scale of its own, since a benchmark's columns differ by orders of magnitude.
    Without matplotlib, which only development needs, the chart stays as it is.
    """
    if not panels:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no matplotlib: {file.name} is left as it is")
        return
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    figure = Figure(figsize=(3.2 * len(panels) + 2.2, 0.34 * len(names) + 1.0), layout="tight")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        shown = [name for name in names if name in rows]
        places = [names.index(name) for name in shown]
        drawn = axis.barh(places, [rows[n] for n in shown], color=[colours[n] for n in shown])
        axis.bar_label(drawn, fmt=digits, padding=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    # Nothing that changes from run to run but the figures.
    figure.savefig(file, dpi=110, metadata={"Software": None})


def lines(file: Path, lines: dict[str, list[tuple[float, float]]], x: str, y: str) -> None:
    """Draw named lines through (x, y) points into a PNG file, both axes from zero."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no matplotlib: {file.name} is left as it is")
        return
    figure = Figure(figsize=(7.0, 2.8), layout="tight")
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def timeline(file: Path, rows: dict[str, list[Any]]) -> None:
    """Draw when the device was busy, a row for each way, into a PNG file.

    Args:
        file: The PNG file.
        rows: ``kernels.Activity`` lists by the way's name.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no matplotlib: {file.name} is left as it is")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9.0, 0.45 * len(rows) + 1.0), layout="tight")
    axis = figure.subplots()
    for place, activities in enumerate(rows.values()):
        spans = [(each.begin / 1000, each.duration / 1000) for each in activities]
        axis.broken_barh(spans, (place - 0.35, 0.7), linewidth=0)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("ms since the first kernel began; white is an idle device", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def curves(file: Path, curves: dict[str, dict[str, Any]]) -> None:
    """Draw curves with logarithmic axes into a PNG file, each with the slope that is expected."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ImportError:
        print(f"no matplotlib: {file.name} is left as it is")
        return
    columns = 4
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.4 * rows), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        xs, ys = zip(*curve["points"], strict=True)
        last = ys[-1]
        expected = [last * (x / xs[-1]) ** curve["expected"] for x in xs]
        axis.loglog(xs, ys, marker=".")
        axis.loglog(xs, expected, linestyle=":", color="grey")
        # At least a decade, so that what is flat looks flat.
        bottom, top = axis.get_ylim()
        wider = max(1.0, (10 * bottom / top) ** 0.5)
        axis.set_ylim(bottom / wider, top * wider)
        for each in (axis.xaxis, axis.yaxis):
            each.set_minor_formatter(NullFormatter())
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(curve["x"], fontsize=7)
        axis.set_ylabel(curve["y"], fontsize=7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes):
        axis.set_axis_off()
    figure.savefig(file, dpi=110, metadata={"Software": None})
