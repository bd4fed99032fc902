"""What does a reply of 4 KB, 800 KB, 12.8 MB or 102 MB cost on its way, and what is the floor?

``make bench`` runs it and writes ``results/wire.json``. No model runs: a reply is made of an array
that is there already, sent, received and dropped. Server and client of each row (wire_peers.py) are
a process each and all of them live through the run; the rows take turns in an order that is
shuffled each round, so that a machine whose speed drifts slows all of them alike. Every row's array
is held against the expected one before anything is timed; what is timed ends when something of each
page was read and the reply dropped. Quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

import common
import report
from wire_peers import ROWS, SHAPES, Row

NAIVE = ROWS[0].name
RAW_TCP = next(r.name for r in ROWS if r.kind == "socket" and not (r.unix or r.fresh))
# In one turn of a row: enough of the short ones that their turn is not all cold caches.
CALLS = {"4 KB": 40, "800 KB": 15, "12.8 MB": 4, "102 MB": 2}
WARM_UP = 4


class End:
    """One end of a row: a process that takes orders on its standard input."""

    def __init__(self, role: str, row: Row, *address: str) -> None:
        command = [sys.executable, str(common.HERE / "wire_peers.py"), role, row.name, *address]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().rstrip("\n")
        if not line:
            raise SystemExit(f"ended too early: {self._process.args!r}")
        return line

    def ask(self, size: str, calls: int) -> Any:
        """Have it make some calls and return their milliseconds; 0 calls: whether one is right."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"size": size, "calls": calls}) + "\n")
        self._process.stdin.flush()
        return json.loads(self.line())

    def close(self) -> None:
        """Have it end, which the end of its input does."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def start(rows: Sequence[Row], closing: ExitStack) -> dict[str, End]:
    """Start both ends of each row and return the calling ones."""
    clients: dict[str, End] = {}
    for row in rows:
        address = []
        if row.kind != "memcpy":
            server = End("serve", row)
            closing.callback(server.close)
            address = [server.line()]
        clients[row.name] = End("call", row, *address)
        closing.callback(clients[row.name].close)
    return clients


def time_in_turns(clients: dict[str, End], size: str, rounds: int) -> dict[str, list[float]]:
    """Check each row, then return its times in milliseconds, the rows taking turns."""
    for name, client in clients.items():
        if client.ask(size, 0) is not True:
            raise SystemExit(f"{name}: {size} arrived wrong")
        client.ask(size, WARM_UP)
    times: dict[str, list[float]] = {name: [] for name in clients}
    order, shuffle = list(clients), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name] += clients[name].ask(size, CALLS[size])
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return each row's percentiles in milliseconds, and its speed as a multiple of two others'."""
    middle = {name: statistics.median(t) for name, t in times.items()}
    return {
        name: {
            "p50": middle[name],
            "p90": float(np.percentile(t, 90)),
            "times_as_fast_as_naive": middle[NAIVE] / middle[name],
            "share_of_raw_tcp": middle[RAW_TCP] / middle[name],
        }
        for name, t in times.items()
    }


def run(rounds: int) -> dict[str, Any]:
    """Time every size; return the results with the machine's facts."""
    results: dict[str, Any] = {
        "machine": common.machine("grpcio", "protobuf", "numpy"),
        "rounds": rounds,
        "sizes": {},
    }
    with ExitStack() as closing:
        clients = start(ROWS, closing)
        for size, shape in SHAPES.items():
            rows = summary(time_in_turns(clients, size, rounds))
            nbytes = int(np.prod(shape)) * 4
            results["sizes"][size] = {"bytes": nbytes, "calls": rounds * CALLS[size], "rows": rows}
            print(size, {name: round(row["p50"], 2) for name, row in rows.items()}, flush=True)
    return results


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    common.save("wire", run(options.rounds))
    report.write()


if __name__ == "__main__":
    main()
