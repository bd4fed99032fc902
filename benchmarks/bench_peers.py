"""How does layertap compare with the servers that a user would otherwise choose?

All of them serve resnet18 up to a layer, as a frozen TorchScript program that one thread at a time
runs with the same number of cores, from Python. Their callers do the same work on the same cores.
Each has an environment of its own, which sees the main one's PyTorch (`make bench-peers` builds
them). Before anything is timed, every value of every reply is compared with the plain module's.
Then all are timed in turns, row by row; the servers whose turn it is not are idle.

A peer whose server does not start is left out of the figures, with the reason in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import common
import report
from loads import CallerProcesses
from peers.given import IMAGE, LAYERS, TENSOR
from peers.layertap_peer import BATCHING
from peers.subject import expected

ENVIRONMENTS = common.HERE.parent / "build" / "peers"
MAIN = Path(sys.prefix)
TOLERANCE = 1e-4
"""Largest difference to the plain module, as a share of the layer's largest magnitude."""
LARGE_BATCH = 64
START_SECONDS = 600
STARTS = 3
"""How often a server is started before its peer is left out: PyTriton's has limits of one second,
which it exceeds on a busy machine."""

END_SECONDS = 30
MARK = "LAYERTAP_BENCH_PEERS"
"""An environment variable that all processes of a run have, so that its remains can be found."""


@dataclass(frozen=True)
class Peer:
    """One row of callers.

    Attributes:
        name: What the tables call it.
        module: The module in ``peers`` with its callers.
        server: The module in ``peers`` with its server.
        environment: Where both run: a folder in ENVIRONMENTS; empty for the main environment.
        distributions: Packages whose versions the results name.
    """

    name: str
    module: str
    server: str
    environment: str = ""
    distributions: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        folder = ENVIRONMENTS / self.environment if self.environment else MAIN
        return folder / "bin" / "python"


IN_PROCESS = "in process"
PEERS = (
    Peer(IN_PROCESS, "in_process", "in_process"),
    Peer("layertap", "layertap_peer", "layertap_peer"),
    Peer("layertap, TCP", "layertap_tcp", "layertap_peer"),
    Peer("bare gRPC", "bare", "bare", distributions=("grpcio",)),
    Peer("PyTriton", "pytriton_peer", "pytriton_peer", "pytriton",
         ("nvidia-pytriton", "tritonclient", "grpcio", "numpy")),
    Peer("LitServe", "litserve_peer", "litserve_peer", "litserve",
         ("litserve", "fastapi", "uvicorn")),
    Peer("Ray Serve", "ray_peer", "ray_peer", "ray", ("ray", "uvicorn")),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What callers ask for.

    Attributes:
        kind: A layer and what is sent for it, as ``peers.given.kinds`` names them.
        batch: Items of a tensor; 1 for a photograph.
        callers: How many ask at once.
    """

    kind: str
    batch: int
    callers: int


def cases(batches: Sequence[int], callers: Sequence[int]) -> list[Case]:
    """Return all cases; batches larger than 1 are of tensors, for the layer with large replies."""
    large, small = LAYERS
    kinds = [
        (f"{small}-{TENSOR}", 1),
        *((f"{large}-{TENSOR}", batch) for batch in batches),
        (f"{small}-{IMAGE}", 1),
        (f"{large}-{IMAGE}", 1),
    ]
    return [Case(kind, batch, count) for kind, batch in kinds for count in callers]


class NotServingError(Exception):
    """A peer's server did not start, or does not give the right values."""


class Servers:
    """The servers that run, by module, and the processes that they have started.

    Args:
        threads: PyTorch's threads in each.
        folder: For addresses and logs.
        batching: layertap's `--batching`.
    """

    def __init__(self, threads: int, folder: Path, batching: str = "auto") -> None:
        self._threads, self._folder, self._batching = threads, folder, batching
        self._mark = uuid.uuid4().hex
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._addresses: dict[str, str] = {}

    def address(self, peer: Peer) -> str:
        """Return the address of a peer's server, which is started if it does not run yet.

        Raises:
            NotServingError: If its environment is missing, or it does not start in time.
        """
        for left in reversed(range(STARTS)):
            if peer.server in self._addresses:
                break
            try:
                self._addresses[peer.server] = self._start(peer)
            except NotServingError:
                if not left or not peer.python.exists():
                    raise
        return self._addresses[peer.server]

    def environment(self) -> dict[str, str]:
        """Return the environment variables of all processes of the run."""
        threads = str(self._threads)
        return {
            **os.environ, MARK: self._mark, "PYTHONPATH": str(common.HERE),
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore",
            BATCHING: self._batching,
        }  # fmt: skip

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time that each server has used, with its processes, by module."""
        ticks = os.sysconf("SC_CLK_TCK")
        parents = _parents()
        used = dict.fromkeys(self._processes, 0.0)
        for module, process in self._processes.items():
            for pid in _descendants(process.pid, parents):
                used[module] += _ticks(pid) / ticks
        return used

    def close(self) -> None:
        """End all servers, and what they have left."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        ends = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()
        self._end_remains()

    def _start(self, peer: Peer) -> str:
        if not peer.python.exists():
            raise NotServingError("its environment is missing: run `make bench-peers`")
        file, log = (self._folder / f"{peer.server}.{end}" for end in ("address", "log"))
        with log.open("wb") as output:
            process = self._processes[peer.server] = subprocess.Popen(
                [peer.python, "-m", "peers.ends", "serve", peer.server, str(self._threads), file],
                stdin=subprocess.PIPE, stdout=output, stderr=output, env=self.environment(),
                cwd=self._folder,
            )  # fmt: skip
        ends = time.monotonic() + START_SECONDS
        while not file.exists():
            if process.poll() is not None or time.monotonic() > ends:
                text = log.read_text("utf-8", "replace").strip() or "no output"
                print(f"The end of the log of {peer.name}:\n{text[-4000:]}", flush=True)
                raise NotServingError(f"its server did not start: {_reason(text)}")
            time.sleep(0.1)
        return file.read_text("utf-8")

    def _end_remains(self) -> None:
        """End the processes that servers have started and left."""
        ends = time.monotonic() + END_SECONDS
        while remains := _marked(self._mark):
            if time.monotonic() > ends:
                print("killed what servers had left:", remains, flush=True)
            for pid in remains:
                with suppress(ProcessLookupError):  # It has ended meanwhile.
                    os.kill(pid, signal.SIGKILL if time.monotonic() > ends else signal.SIGTERM)
            time.sleep(0.5)
        for process in self._processes.values():
            process.wait()


def _reason(log: str) -> str:
    """Return the last line of a log that names an error, or else the last one."""
    lines = [line for line in log.splitlines() if any(map(str.isalpha, line))] or [log]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines)[-1].strip()


def _marked(mark: str) -> list[int]:
    """Return the other processes whose environment has the run's mark, zombies left out."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # It has ended, or belongs to somebody else.
    return [pid for pid in found if pid != os.getpid()]


def _parents() -> dict[int, int]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name in brackets may hold anything.
            fields = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        found[int(folder.name)] = int(fields[1])
    return found


def _descendants(pid: int, parents: dict[int, int]) -> list[int]:
    own = [pid]
    for each in own:  # It grows meanwhile.
        own += [child for child, parent in parents.items() if parent == each]
    return own


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


@contextmanager
def calling(servers: Servers, peer: Peer, processes: int) -> Iterator[CallerProcesses]:
    """Yield processes of callers of a peer."""
    command = [str(peer.python), "-m", "peers.ends", "call", peer.module, servers.address(peer)]
    callers = CallerProcesses(command, processes, servers.environment())
    try:
        yield callers
    finally:
        callers.close()


def verify(callers: CallerProcesses, wanted: Sequence[Case], right: dict[str, Path]) -> float:
    """Compare every reply with the plain module's; return the largest difference.

    Raises:
        NotServingError: If a call fails, or a difference is larger than TOLERANCE.
    """
    largest = 0.0
    for kind, batch in dict.fromkeys((case.kind, case.batch) for case in wanted):
        order = {"kind": kind, "batch": batch, "right": str(right[f"{kind}-{batch}"])}
        answer = callers.ask(order)
        if "error" in answer:
            raise NotServingError(f"{kind}, batch {batch}: {answer['error']}")
        if not answer["difference"] <= TOLERANCE:
            raise NotServingError(
                f"{kind}, batch {batch}: the values differ by {answer['difference']:.1e}"
            )
        largest = max(largest, answer["difference"])
    return largest


def versions(peer: Peer) -> dict[str, str]:
    """Return the versions of a peer's packages, and of its Python."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version(), "
        "**{name: version(name) for name in sys.argv[1:]}}))"
    )
    command = [str(peer.python), "-c", code, *peer.distributions]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def right_values(wanted: Sequence[Case], folder: Path) -> dict[str, Path]:
    """Compute what is right with the plain module, and write it into files."""
    files = {}
    for kind, batch in dict.fromkeys((case.kind, case.batch) for case in wanted):
        files[f"{kind}-{batch}"] = file = folder / f"{kind}-{batch}.npy"
        np.save(file, expected(kind, batch))
    return files


def idle_cores(servers: Servers, seconds: float) -> dict[str, float]:
    """Return the cores that each server uses while nobody calls it, by module."""
    begun, before = time.monotonic(), servers.cpu_seconds()
    time.sleep(seconds)
    took = time.monotonic() - begun
    return {name: (used - before[name]) / took for name, used in servers.cpu_seconds().items()}


def measure(
    callers: dict[str, CallerProcesses],
    wanted: Sequence[Case],
    right: dict[str, Path],
    rounds: int,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Time all peers in turns, row by row."""
    for case in wanted:
        times: dict[str, list[float]] = {}
        rates: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, processes in callers.items():
                # A loop in process has no use for more callers than its one thread.
                count = 1 if name == IN_PROCESS else case.callers
                order = {"kind": case.kind, "batch": case.batch}
                # A pass of a large batch takes so long that its first one differs little.
                few = 1 if case.batch >= LARGE_BATCH else 2
                answered = processes.load(order, count, seconds, least=few, warm=few)
                times.setdefault(name, []).extend(answered.times)
                rates.setdefault(name, []).append(len(answered.times) / max(answered.ends))
        layer, sent = case.kind.split("-")
        row = {
            "layer": layer, "sent": sent, "batch": case.batch, "callers": case.callers,
            "reply bytes": np.load(right[f"{case.kind}-{case.batch}"], mmap_mode="r").nbytes,
            "ms": {name: common.quantiles(values) for name, values in times.items()},
            "rates": {name: _quartiles(values) for name, values in rates.items()},
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        yield row


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the quartiles of the rounds' rates."""
    if len(values) == 1:
        return dict.fromkeys(("p25", "p50", "p75"), values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"p25": low, "p50": statistics.median(values), "p75": high}


def run(
    peers: Sequence[Peer], wanted: Sequence[Case], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Serve, verify and time; yield the results after each row."""
    excluded: dict[str, str] = {}
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as name, ExitStack() as closing:
        folder = Path(name)
        right = right_values(wanted, folder)
        servers = Servers(options.threads, folder, options.batching)
        closing.callback(servers.close)
        callers: dict[str, CallerProcesses] = {}
        for peer in peers:
            processes = 1 if peer.name == IN_PROCESS else len(common.cores())
            try:
                mine = closing.enter_context(calling(servers, peer, processes))
                differences[peer.name] = verify(mine, wanted, right)
            except NotServingError as error:
                excluded[peer.name] = str(error)
                print(f"{peer.name} is left out: {error}", flush=True)
                continue
            callers[peer.name] = mine
            print(f"{peer.name}: values differ by at most {differences[peer.name]:.1e}", flush=True)
        idle = idle_cores(servers, options.seconds * 2)
        results: dict[str, Any] = {
            "machine": common.machine("torch", "torchvision"),
            "threads": options.threads,
            "batching": options.batching,
            "processes": len(common.cores()),
            "seconds": options.seconds,
            "versions": {peer.name: versions(peer) for peer in peers if peer.name in callers},
            "largest difference": differences,
            "idle cores": idle,
            "left out": excluded,
            "rows": [],
        }
        for row in measure(callers, wanted, right, options.rounds, options.seconds):
            results["rows"].append({**row, "rounds": options.rounds})
            yield results


def merged(results: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Return results with the rows of an earlier run for other cases.

    Raises:
        SystemExit: If the earlier run was of other servers, or on another machine.
    """
    if earlier is None:
        return results
    for key in ("threads", "batching", "processes", "seconds", "versions", "left out"):
        if results[key] != earlier[key]:
            raise SystemExit(f"{key}: got {results[key]}, the earlier rows are of {earlier[key]}")
    if results["machine"]["cpu"] != earlier["machine"]["cpu"]:
        raise SystemExit("the earlier rows are of another processor")
    rows = {_case(row): row for row in (*earlier["rows"], *results["rows"])}
    kinds = list(dict.fromkeys(case.kind for case in cases([1], [1])))
    ordered = sorted(rows, key=lambda each: (kinds.index(each[0]), *each[1:]))
    largest = {
        name: max(difference, earlier["largest difference"][name])
        for name, difference in results["largest difference"].items()
    }
    return {**results, "largest difference": largest, "rows": [rows[each] for each in ordered]}


def _case(row: dict[str, Any]) -> tuple[str, int, int]:
    return f"{row['layer']}-{row['sent']}", row["batch"], row["callers"]


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each peer in each round")
    parser.add_argument("--threads", type=int, default=len(common.cores()))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in PEERS])
    parser.add_argument("--kinds", nargs="+", help="such as avgpool-image; all if not given")
    parser.add_argument(
        "--keep", action="store_true", help="keep the earlier results' rows of other cases"
    )
    parser.add_argument("--batching", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--quick", action="store_true", help="a dry run: figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.batches = 1, 0.1, [1, 2]
    peers = [peer for peer in PEERS if peer.name in options.peers]
    wanted = [
        case
        for case in cases(options.batches, options.callers)
        if options.kinds is None or case.kind in options.kinds
    ]
    earlier = common.load("peers", options.results) if options.keep else None
    results: dict[str, Any] = {"largest difference": {}}
    for results in run(peers, wanted, options):
        # A run that is cut off keeps its rows.
        common.save("peers", merged(results, earlier), options.results)
    if "layertap" in results["largest difference"]:
        report.write(options.results)
    else:
        print("without layertap, which all others are compared with, no page is written")


if __name__ == "__main__":
    main()
