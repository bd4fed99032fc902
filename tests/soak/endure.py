"""Does the server stay right, with constant memory, whatever clients do to it?

    PYTHONPATH=tests python tests/soak/endure.py --seconds 300 --report build/soak.json

A server in a process of its own is asked by others: first for passes as long as a ResNet-18's, by
as many callers at once as it admits, then for those four times as often as it could answer, then by
a mixture of good and bad clients for short ones, while weights are replaced under it and clients
are killed in mid-call. In the end it is told to stop, under load.
Exit code 1 where an answer was wrong, a refusal not a documented one, or memory or file descriptors
were not level.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soaknets
from processes import ENVIRONMENT, Serving

HERE = Path(__file__).resolve().parent
PENDING = 8
"""Requests that the server admits: its capacity, as callers at once."""

OVERLOAD = 4
GRACE = 20

CONFIG = f"""
[server]
port = 0
metrics_port = -1
plan_cache = "off"
mode = "throughput"   # The clients are busy on the same cores, where teams of threads stall.
grace_seconds = {GRACE}
shared_memory_lease_seconds = 5   # After it what nobody uses is let go of, and its files are.

[limits]
pending = {PENDING}
pending_mib = 256
request_mib = 16
reply_mib = 64
batch = 64

[[models]]
name = "a"
source = "soaknets:build"
weights = "a.pth"
item_shape = [3, {soaknets.SIDE}, {soaknets.SIDE}]
layers = ["third"]
max_batch_size = 8

[[models]]
name = "b"
source = "soaknets:build"
weights = "b.pth"
item_shape = [3, {soaknets.SIDE}, {soaknets.SIDE}]

# With passes that cost next to nothing, it is the callers on the same cores that would be measured.
[[models]]
name = "heavy"
source = "soaknets:build_heavy"
item_shape = [3, {soaknets.SIDE}, {soaknets.SIDE}]
layers = ["first", "burn", "third"]
"""


class Callers:
    """A process of callers, and its last report."""

    def __init__(self, address: str, threads: int, mode: str, interval: float = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "callers.py", address, *map(str, (threads, mode, interval))],
            env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.seen: dict[str, Any] = {"ended": {}, "wrong": [], "latencies": [], "seconds": 0}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def end(self, timeout: float = 120) -> dict[str, Any]:
        """Let every request end, and return the report."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout)
        return self._closed()

    def kill(self) -> dict[str, Any]:
        """Kill it in the middle of calls, and return its last report."""
        self.process.kill()
        self.process.wait()
        return self._closed()

    def _closed(self) -> dict[str, Any]:
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return self.seen

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen = json.loads(line)


class Watch:
    """Samples a process's memory and file descriptors each second, from /proc."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, int]] = []
        self._folder = Path(f"/proc/{pid}")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def descriptors(self) -> int:
        """Return how many are open now."""
        return len(list((self._folder / "fd").iterdir()))

    def close(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(1.0):
            lines = (self._folder / "status").read_text("ascii").splitlines()
            resident = next(line for line in lines if line.startswith("VmRSS"))
            self.samples.append((int(resident.split()[1]) / 1024, self.descriptors()))


class Soak:
    """One run: the server, and the stages that it goes through."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._seconds = seconds
        self._chance = random.Random()
        self._versions = Counter({"a": 1, "b": 1})
        self._ended: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._before_end: Counter[str] = Counter()
        for model in self._versions:
            soaknets.save_weights(folder / f"{model}.pth", 1)
        (folder / "layertap.toml").write_text(CONFIG, "utf-8")
        self.server = Serving(["--config", str(folder / "layertap.toml")], fresh=False)

    def run(self) -> dict[str, Any]:
        """Go through the stages and return the report."""
        address = self.server.address
        watch = Watch(self.server.process.pid)
        self._timed(address, 1, self._seconds * 0.05)  # Warms up what is counted next.
        idle = watch.descriptors()
        capacity = self._timed(address, 1, self._seconds * 0.15)
        # As often, all callers together, as OVERLOAD times what was answered just now; each comes
        # so seldom that it was answered before.
        interval = 2 * PENDING / capacity["answered a second"]
        overload = self._timed(
            address, OVERLOAD, self._seconds * 0.15, threads=2 * PENDING, interval=interval
        )
        reloads, killed = self._mixed(address, self._seconds * 0.6)
        self._wait_idle(watch, idle)
        descriptors = watch.descriptors()
        watch.close()
        stop = self._stop(address)
        return {
            "seconds": self._seconds,
            "ended": dict(sorted(self._ended.items())),
            "wrong": self._wrong,
            "unavailable before the stop": sum(
                count for how, count in self._before_end.items() if "navailable" in how.lower()
            ),
            "at capacity": capacity,
            f"at {OVERLOAD}x": overload,
            "p99 ratio": overload["p99 ms"] / capacity["p99 ms"],
            "reloads": reloads,
            "clients killed": killed,
            "memory MiB": [round(memory) for memory, _ in watch.samples],
            "descriptors": {"idle before": idle, "idle after": descriptors},
            "stop": stop,
        }

    def _note(self, seen: dict[str, Any]) -> list[float]:
        self._ended.update(seen["ended"])
        self._wrong.extend(seen["wrong"])
        return list(seen["latencies"])

    def _timed(
        self,
        address: str,
        processes: int,
        seconds: float,
        *,
        threads: int = PENDING,
        interval: float = 0,
    ) -> dict[str, float]:
        """Let callers request heavy passes; return how many were answered, and how long it took."""
        callers = [Callers(address, threads, "heavy", interval) for _ in range(processes)]
        time.sleep(seconds)
        seen = [each.end() for each in callers]
        seconds = max(each["seconds"] for each in seen)
        latencies = [ms for each in seen for ms in self._note(each)]
        return {
            "asked a second": sum(sum(each["ended"].values()) for each in seen) / seconds,
            "answered a second": len(latencies) / seconds,
            "p50 ms": statistics.median(latencies),
            "p99 ms": statistics.quantiles(latencies, n=100)[98],
        }

    def _mixed(self, address: str, seconds: float) -> tuple[int, int]:
        """Let all kinds of callers run; replace weights and kill clients meanwhile."""
        processes = [Callers(address, PENDING, "mixed") for _ in range(OVERLOAD)]
        ends, reloads, killed = time.monotonic() + seconds, 0, 0
        while time.monotonic() < ends:
            time.sleep(min(seconds / 8, 3.0))
            self._reload()
            reloads += 1
            if reloads % 2:
                self._note(processes.pop(0).kill())
                processes.append(Callers(address, PENDING, "mixed"))
                killed += 1
        for process in processes:
            self._note(process.end())
        self._before_end = Counter(self._ended)
        return reloads, killed

    def _reload(self) -> None:
        model = self._chance.choice(sorted(self._versions))
        self._versions[model] += 1
        soaknets.save_weights(self._folder / f"{model}.pth", self._versions[model])
        self.server.process.send_signal(signal.SIGHUP)

    def _wait_idle(self, watch: Watch, idle: int) -> None:
        """Give the server some time to notice that its clients are gone."""
        ends = time.monotonic() + 20
        while watch.descriptors() > idle and time.monotonic() < ends:
            time.sleep(0.1)

    def _stop(self, address: str) -> dict[str, Any]:
        """Stop it under load: admitted requests are answered, and it ends by itself."""
        process = Callers(address, PENDING, "plain")
        while not process.seen["ended"]:
            time.sleep(0.05)
        begun = time.monotonic()
        self.server.process.send_signal(signal.SIGTERM)
        code = self.server.ended(GRACE + 30)
        seconds = time.monotonic() - begun
        seen = process.kill()
        self._note(seen)
        return {"exit code": code, "seconds": seconds, "ended": seen["ended"]}


def faults(report: dict[str, Any]) -> list[str]:
    """Return the faults in a report."""
    found = [f"wrong: {text}" for text in report["wrong"]]
    if report["unavailable before the stop"]:
        found.append("requests were UNAVAILABLE before the server was told to stop")
    if report["stop"]["exit code"]:
        found.append(f"exit code {report['stop']['exit code']}")
    memory = report["memory MiB"]
    third = len(memory) // 3
    middle, last = max(memory[third : 2 * third]), max(memory[2 * third :])
    if last > middle * 1.1 + 32:
        found.append(f"memory grows: {middle} MiB, then {last}")
    descriptors = report["descriptors"]
    if descriptors["idle after"] > descriptors["idle before"] + 4:
        found.append(f"file descriptors leak: {descriptors}")
    return found


def soak(seconds: float) -> dict[str, Any]:
    """Run, and return the report with its faults."""
    with tempfile.TemporaryDirectory() as folder:
        run = Soak(Path(folder), seconds)
        try:
            report = run.run()
        finally:
            run.server.close()
    return {**report, "faults": faults(report)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--report", type=Path, default=Path("build/soak.json"))
    options = parser.parse_args(arguments)
    report = soak(options.seconds)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "memory MiB"}, indent=2))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
