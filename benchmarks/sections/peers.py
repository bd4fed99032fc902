"""The section of ``bench_peers.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import charts
import common
from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

PEERS = """
## How does layertap compare with other servers?

[bench_peers.py](bench_peers.py) (`make bench-peers`): all servers have resnet18 up to a layer as a
frozen TorchScript program, run by one thread at a time with {threads} cores of PyTorch, and take
turns, {rounds} rounds of {seconds:g} s in each row. The callers are {processes} processes on the
same cores. Every value of every reply was compared with the plain module's before anything was
timed; the largest difference was {difference:.0e} of a layer's largest magnitude. A tensor of
batch 1 has 0.6 MB, and one of batch 128 77 MB; the photograph is a JPEG of 60 KB, which
the servers decode and preprocess as torchvision's transform does: layertap by
[its own code](../docs/images.md), the others by that transform. Machine: {facts}.

- **in process**: the program in the caller, without a server
- **layertap**: `--batching {batching}`; its Python client, which uses
  [shared memory](../docs/shared_memory.md) for large tensors on the server's machine;
  **layertap, TCP**: the same without shared memory
- **bare gRPC**: the least that a server in Python can be; it takes and returns bytes, and parses,
  checks and counts nothing
- **PyTriton**: its own gRPC client, dynamic batching as by default, two instances that decode
- **LitServe**: HTTP with bytes in the body, one worker, `fast_queue`
- **Ray Serve**: HTTP with bytes in the body, one replica, `RAY_SERVE_THROUGHPUT_OPTIMIZED`
{left_out}
One caller, milliseconds, median (quartiles). The last column is the median of the fastest other
server relative to layertap's:

{alone}

![Milliseconds of each server, one caller](results/peers.png)
{together}
{behind}Versions: {versions}. While nobody called them, the servers used {idle} of a core.
"""

PEERS_TOGETHER = """
{callers} callers, answers a second, median (quartiles) of the rounds. The last column is layertap's
relative to those of the fastest other server:

{table}

![Answers a second of each server, {callers} callers](results/{file})
"""

PEERS_SHORT = """
The table compares layertap with other servers of the same TorchScript program on {cores} cores: how
many times as fast layertap answers as each of them, one caller by the median time of a reply and
{callers} callers by answers a second (`make bench-peers`;
[all figures](benchmarks/README.md#how-does-layertap-compare-with-other-servers)):

{table}
"""

PEERS_BEGIN = "<!-- Written by benchmarks/report.py from the results of make bench-peers -->"

PEERS_END = "<!-- End of what is written -->"

BEHIND: dict[str, str] = {}
"""Why another server is ahead of layertap, by the title of the row in `section`."""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rows, names = results["rows"], list(results["largest difference"])
    charts.bars(
        folder / "peers.png",
        {
            _peer_title(row): {name: each["p50"] for name, each in row["ms"].items()}
            for row in rows
            if row["callers"] == 1
        },
    )
    together = []
    for callers in dict.fromkeys(row["callers"] for row in rows if row["callers"] > 1):
        mine = [row for row in rows if row["callers"] == callers]
        file = f"peers_{callers}.png"
        charts.bars(
            folder / file,
            {
                _peer_title(row): {name: each["p50"] for name, each in row["rates"].items()}
                for row in mine
            },
            unit="answers a second",
        )
        table = markdown_table(["", *names, "ahead"], _peer_rows(mine, names, "rates"))
        together.append(PEERS_TOGETHER.format(callers=callers, table=table, file=file))
    alone = [row for row in rows if row["callers"] == 1]
    excluded = results["left out"].items()
    if folder == common.RESULTS:
        _write_short_peers(results)
    return PEERS.format(
        threads=results["threads"],
        batching=results["batching"],
        rounds=_range([row["rounds"] for row in results["rows"]]),
        seconds=results["seconds"],
        processes=results["processes"],
        difference=max(results["largest difference"].values()),
        facts=facts(results["machine"]),
        left_out="".join(f"- **{name}** is left out: {reason}\n" for name, reason in excluded),
        alone=markdown_table(["", *names, "ahead"], _peer_rows(alone, names, "ms")),
        together="".join(together),
        behind=_behind(rows),
        versions="; ".join(f"{name}: {facts(each)}" for name, each in results["versions"].items()),
        idle=", ".join(
            f"{100 * cores:.0f} % ({name.removesuffix('_peer')})"
            for name, cores in results["idle cores"].items()
        ),
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _peer_title(row: dict[str, Any]) -> str:
    """Return what callers send and get, such as ``a batch of 16, layer1 (12.8 MB)``."""
    nbytes = row["reply bytes"]
    size = f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} KB"
    sent = {"tensor": "a tensor", "image": "a photograph"}[row["sent"]]
    if row["batch"] > 1:
        sent = f"a batch of {row['batch']}"
    return f"{sent}, {row['layer']} ({size})"


def _peer_rows(rows: Sequence[dict[str, Any]], names: Sequence[str], what: str) -> list[list[str]]:
    return [
        [
            _peer_title(row),
            *(quartiles(row[what][name]) if name in row[what] else "–" for name in names),
            f"{_ahead(row):.2f}×",
        ]
        for row in rows
    ]


def _ahead(row: dict[str, Any], name: str = "") -> float:
    """Return how many times as fast layertap is as a server, or as the fastest of the others."""
    ratios = {other: _times_as_fast(row, other) for other in row["ms"]}
    if name:
        return ratios[name]
    return min(ratio for other, ratio in ratios.items() if _is_other_server(other))


def _times_as_fast(row: dict[str, Any], other: str) -> float:
    if row["callers"] == 1:
        return float(row["ms"][other]["p50"] / row["ms"]["layertap"]["p50"])
    return float(row["rates"]["layertap"]["p50"] / row["rates"][other]["p50"])


def _is_other_server(name: str) -> bool:
    return name != "in process" and not name.startswith("layertap")


def _behind(rows: Sequence[dict[str, Any]]) -> str:
    """Return a list of the rows in which another server is ahead, with the reasons."""
    lines = []
    for row in rows:
        if (ratio := _ahead(row)) < 1:
            title = f"{_peer_title(row)}, callers: {row['callers']}"
            reason = BEHIND.get(title, "the reason was not examined")
            lines.append(f"- {title}: {ratio:.2f}×; {reason}\n")
    if not lines:
        return "layertap is ahead of every other server in every row.\n\n"
    return f"Rows in which another server is ahead of layertap:\n\n{''.join(lines)}\n"


def _write_short_peers(results: dict[str, Any]) -> None:
    """Write the short table into the project's README, between two comments."""
    file = common.HERE.parent / "README.md"
    before, begin, rest = file.read_text("utf-8").partition(PEERS_BEGIN)
    _, end, after = rest.partition(PEERS_END)
    if not end:
        return
    rows = results["rows"]
    others = [name for name in results["largest difference"] if _is_other_server(name)]
    shown = [
        [
            _peer_title(row),
            str(row["callers"]),
            *(f"{_ahead(row, name):.1f}×" if name in row["ms"] else "–" for name in others),
        ]
        for row in rows
    ]
    text = PEERS_SHORT.format(
        cores=results["threads"],
        callers=max(row["callers"] for row in rows),
        table=markdown_table(["request", "callers", *others], shown),
    )
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")
