"""Write the section of docs/coverage.md about public packages, from the rows of each group."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS / "coverage")]

from page import write_section

from zoo.prove_zoo import Row, remarks

ORDER = ("HOOK", "TORCHSCRIPT", "AUTO")

HEADER = """## Public packages

{models} models of {packages} public packages, {architectures} of them Hugging Face architectures
from configurations, whole and with all their inputs; the others take one tensor each. Random
weights, the smallest configurations; lengths, batch sizes and padding vary. Each is served by HOOK
(every layer), TORCHSCRIPT and AUTO (twelve layers spread over the model), three requests in a row
and in throughput mode to eight callers, and every answer is held against a fresh instance that runs
once under cloning hooks: HOOK bit for bit, the others within 1e-4 of a layer's largest magnitude.
`make test-packages` writes this section, in environments of their own.

{answers} answers were right, **{wrong} wrong**, {failed} failed; {late} layers were refused only by
a request, and {unloadable} models were refused when they were loaded.

A cell is *layers of which every answer was right / layers that the catalogue refuses*.

"""


def section(rows: Sequence[Row]) -> str:
    """Return the section as Markdown."""
    head = HEADER.format(
        models=len(rows),
        packages=len({row.awkward for row in rows}),
        architectures=sum(row.awkward == "transformers" for row in rows),
        answers=f"{sum(row.answers for row in rows):,}",
        unloadable=sum(bool(row.unloadable) for row in rows),
        **{kind: sum(len(getattr(row, kind)) for row in rows)
           for kind in ("wrong", "failed", "late")},
    )  # fmt: skip
    lines = [
        f"| package | model | layers | {' | '.join(ORDER)} | wrong | remarks |",
        f"| --- | --- | --- |{' --- |' * (len(ORDER) + 2)}",
    ]
    for row in rows:
        cells = [f"{row.right.get(e, 0)} / {row.refused.get(e, 0)}" for e in ORDER]
        cells = ["–"] * len(ORDER) if row.unloadable else cells
        cells = [row.awkward, row.specimen, str(row.layers), *cells, str(len(row.wrong))]
        lines.append(f"| {' | '.join(cells)} | {remarks(row)} |")
    return head + "\n".join(lines) + "\n"


def main() -> int:
    """Read every group's JSON in a folder, and write the section of a page."""
    folder, page = map(Path, sys.argv[1:3])
    rows = [
        Row(**row) for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())
    ]
    write_section(page, "packages", section(sorted(rows, key=lambda r: (r.awkward, r.specimen))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
