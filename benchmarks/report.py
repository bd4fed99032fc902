"""Writes README.md and its charts from whatever results there are.

Each benchmark calls ``write`` when it has saved its results; run as a program it does the same
without a benchmark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import charts
import common

__all__ = ["write"]

EAGER = "full eager pass with cloning hooks"

TITLE = """# Benchmarks

`make bench` runs short versions of everything here, `make bench ARGS="--rounds 30"` longer ones,
and writes this page from [results](results). Times are those of one machine, and a busy one is a
slow one; the ratios, taken within one run, are what to quote. Outputs are verified before timing.
"""

EXTRACTORS = """
## What does each way to take a layer cost?

[bench_extractors.py](bench_extractors.py): milliseconds at batch 1, medians of {rounds} runs; in
brackets how many times faster than today's habit. Machine: {facts}.

{table}

![Milliseconds of each way, by case](results/extractors.png)
"""

WIRE = """
## What does a reply cost on its way, and what is the floor?

[bench_wire.py](bench_wire.py): no model, from an array in one process to an array in another and
until it is dropped there; milliseconds, median / 90th percentile of {calls} calls. Memory kept is
[`layertap.keep_memory()`](../docs/performance.md) on both sides. Machine: {facts}.

{times}

How many times as fast as naive protobuf, and which share of the speed of a raw TCP socket that
receives into a reused buffer (at least 50 % is the goal, beside 5 times naive for 12.8 MB and 6
times for 102 MB):

{ratios}

![Milliseconds of each row, by size](results/wire.png)
"""


def write() -> None:
    """Write the page and the charts of every benchmark that has results."""
    parts = [TITLE]
    if (results := common.load("extractors")) is not None:
        parts.append(_extractors(results))
    if (results := common.load("wire")) is not None:
        parts.append(_wire(results))
    (common.HERE / "README.md").write_text("".join(parts), "utf-8")


def _extractors(results: dict[str, Any]) -> str:
    cases = results["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    rows = [[name, *(_with_ratio(case, name) for case in cases.values())] for name in names]
    charts.bars(
        common.RESULTS / "extractors.png",
        {case: {n: r["p50"] for n, r in ways.items()} for case, ways in cases.items()},
    )
    return EXTRACTORS.format(
        rounds=results["rounds"],
        facts=_facts(results["machine"]),
        table=_table(["way", *cases], rows),
    )


def _with_ratio(case: dict[str, Any], name: str) -> str:
    if name not in case:
        return "–"
    p50 = case[name]["p50"]
    return f"{p50:.1f} ({case[EAGER]['p50'] / p50:.2f}×)"


def _wire(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    names = list(next(iter(sizes.values()))["rows"])
    by_row = {name: [size["rows"][name] for size in sizes.values()] for name in names}
    charts.bars(
        common.RESULTS / "wire.png",
        {size: {n: r["p50"] for n, r in of["rows"].items()} for size, of in sizes.items()},
    )
    calls = [str(size["calls"]) for size in sizes.values()]
    return WIRE.format(
        calls=f"{', '.join(calls[:-1])} and {calls[-1]}",
        facts=_facts(results["machine"]),
        times=_table(
            ["row", *sizes],
            (
                [n, *(f"{charts.digits(r['p50'])} / {charts.digits(r['p90'])}" for r in rs)]
                for n, rs in by_row.items()
            ),
        ),
        ratios=_table(
            ["row", *sizes],
            (
                [n, *(f"{_naive(r):.1f}×, {_raw(r):.0%}" for r in rs)]
                for n, rs in by_row.items()
                if n.startswith("layertap")
            ),
        ),
    )


def _naive(row: dict[str, float]) -> float:
    return row["times_as_fast_as_naive"]


def _raw(row: dict[str, float]) -> float:
    return row["share_of_raw_tcp"]


def _facts(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write()
