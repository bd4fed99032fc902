"""Does a server stay right and answer health checks while its environment fails?

    PYTHONPATH=tests:tests/soak python tests/chaos/drill.py --seconds 10 --report build/chaos.json

A server in a process of its own is asked by clients that check every value, and probed for its
health ten times a second. Meanwhile one thing after another goes wrong: its disk fills up or can
only be read, it gets no more threads, memory or files, the clock jumps, clients are killed, stopped
or say nothing. After each fault it must answer again as before.

Exit code 1 where an answer was wrong, a call never ended or ended in an undocumented way, a health
probe took longer than a second, or the server died of a fault. A fault that this machine doesn't
let us cause is reported as skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import soaknets
from endure import Callers
from layertap import Client, LayertapError
from probes import Probes
from processes import Serving
from surroundings import Clock, Disk, MemoryGroup, NotPossibleError, few_threads

DAY = 86400
MEMORY = 1280 << 20
"""The server's memory limit: some 500 MiB for the process, the rest for what its limits allow."""

FILES = 256
"""File descriptors that the server may have; a few hundred connections use them up."""

ENDS_WITHIN = 30.0
"""Seconds within which the server answers again once a fault is over."""

CALLS_END = 75.0
"""Seconds within which every call ends; the clients' own deadline is a minute."""

LOG_LINES = 40
"""Lines of the server's log that a fault's report keeps."""

CONFIG = """
[server]
port = 0
metrics_port = 0
plan_cache = "{disk}"
mode = "throughput"   # The clients are busy on the same cores, where teams of threads stall.
threads = 1

[limits]
pending = 16          # The limits in bytes are the defaults, which follow the memory limit.
batch = 64

[[models]]
name = "a"
source = "soaknets:build"
weights = "a.pth"
item_shape = [3, {side}, {side}]
layers = [{layers}]

[[models]]
name = "b"
source = "soaknets:build"
weights = "b.pth"
item_shape = [3, {side}, {side}]
"""

# What a client may be told while something is wrong.
EXPECTED = (
    *("OverloadedError", "UnavailableError", "DeadlineExceededError", "SharedMemoryLostError"),
    *("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
)


class Drill:
    """A server, its clients and its probes, and what went wrong so far.

    Args:
        folder: For its files.
        seconds: How long each fault lasts.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.seconds = seconds
        self.folder = folder
        self._skipped: dict[str, str] = {}
        # Now, as the drill's own load comes later.
        self._stretch = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
        self.disk = self._have("disk", Disk)
        self.clock = self._have("clock", lambda: Clock(folder))
        self.memory = self._have("memory", lambda: MemoryGroup(MEMORY))
        for model in ("a", "b"):
            soaknets.save_weights(folder / f"{model}.pth", 1)
        self.configure("first")
        try:
            self.start()
        except BaseException:
            self.server.close()
            self._unmount()
            raise

    def configure(self, *layers: str) -> None:
        """Write the configuration; the compiled plans of these layers are kept on the disk."""
        disk = self.disk.folder if self.disk else "off"
        names = ", ".join(f'"{layer}"' for layer in layers)
        text = CONFIG.format(disk=disk, side=soaknets.SIDE, layers=names)
        (self.folder / "layertap.toml").write_text(text, "utf-8")

    def start(self) -> None:
        """Start a server; for the first time, or after one that died."""
        limit = f'ulimit -n {FILES}; exec "$@"'
        if self.memory:
            limit = f"{self.memory.join}; {limit}"
        self.server = Serving(
            ["--config", str(self.folder / "layertap.toml")],
            prefix=("sh", "-c", limit, "sh"),
            environment=self.clock.environment if self.clock else {},
        )
        self.address = self.server.address
        port = int(self.server.line(r"metrics on http://.*:(\d+)/metrics$")[1])
        self.probes = Probes(self.address, port, self._stretch)

    @property
    def pid(self) -> int:
        """The server's process."""
        return self.server.process.pid

    def run(self, faults: Sequence[Callable[[Drill], None]]) -> dict[str, Any]:
        """Cause each fault, and return what was seen."""
        report: dict[str, Any] = {}
        for fault in faults:
            report[fault.__name__] = seen = self._run(fault)
            skipped = f"skipped: {seen['skipped']}" if seen["skipped"] else ""
            print(f"{fault.__name__}: {seen['faults'] or skipped or 'passed'}", flush=True)
            if self.server.process.poll() is not None or not seen["recovered"]:
                self.probes.close()
                self.server.close()
                self.start()
        return report

    def close(self) -> None:
        """End everything."""
        self.probes.close()
        self.server.close()
        self._unmount()

    def _unmount(self) -> None:
        for each in (self.disk, self.memory):
            if each:
                each.close()

    def _run(self, fault: Callable[[Drill], None]) -> dict[str, Any]:
        self.probes.take()
        callers = Callers(self.address, 2, "mixed")
        begun, said = time.monotonic(), len(self.server.lines)
        wrong: list[str] = []
        skipped, recovered = "", False
        try:
            fault(self)
        except NotPossibleError as error:
            skipped = str(error)
        except LayertapError as error:
            wrong.append(f"the fault's own call ended with {type(error).__name__}: {error}")
        seen: dict[str, Any] = {"ended": {}}
        if self.server.process.poll() is None:
            lasting = self._recovers()
            recovered = not lasting
            wrong += lasting
            try:
                seen = self.end(callers)
            except LayertapError as error:
                wrong.append(str(error))
        else:
            seen = callers.kill()
        wrong += [text for text in seen.get("wrong", ()) if not text.endswith(EXPECTED)]
        slowest, late = self.probes.take()
        code = self.server.process.poll()
        if code is not None:
            last = self.server.lines[-3:]
            wrong.append(f"the server ended with {code}: {last}")
        else:
            wrong += late
        return {
            "seconds": round(time.monotonic() - begun, 1),
            "skipped": skipped,
            "faults": wrong,
            "recovered": recovered,
            "slowest probe, s": slowest,
            "ended": seen["ended"],
            "log": self.server.lines[said : said + LOG_LINES],
        }

    def end(self, callers: Callers) -> dict[str, Any]:
        """Wait until each call of some callers has ended, and return what they saw.

        Raises:
            LayertapError: Where one never ends: each has a deadline of its own.
        """
        try:
            return callers.end(CALLS_END)
        except subprocess.TimeoutExpired:
            callers.kill()
            raise LayertapError(f"some call has not ended after {CALLS_END:g} s") from None

    def _recovers(self) -> list[str]:
        """Ask until it answers right again; return what is wrong if it doesn't."""
        x = np.full((1, 3, soaknets.SIDE, soaknets.SIDE), 5, np.float32)
        ends, last = time.monotonic() + ENDS_WITHIN, ""
        while time.monotonic() < ends:
            try:
                with Client(self.address, timeout=5) as client:
                    value = client.extract("a", x, "third")["third"]
            except LayertapError as error:
                last = f"{type(error).__name__}: {error}"
                time.sleep(0.1)
                continue
            right = np.array_equal(value, np.full_like(value, 61))
            return [] if right else [f"a wrong value after the fault: {value.ravel()[:3]}"]
        return [f"it answers nothing {ENDS_WITHIN:g} s after the fault: {last}"]

    def _have(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except NotPossibleError as error:
            self._skipped[name] = str(error)
            return None

    def needs(self, name: str) -> None:
        """Skip a fault where what it needs is not there."""
        if name in self._skipped:
            raise NotPossibleError(self._skipped[name])

    def reload(self, *layers: str) -> None:
        """Have the server compile other layers, which it stores on its disk, and wait for that."""
        self.configure(*layers)
        done = sum("reload" in line or "replaced" in line for line in self.server.lines)
        self.server.process.send_signal(signal.SIGHUP)
        ends = time.monotonic() + self.seconds + ENDS_WITHIN
        while time.monotonic() < ends and self.server.process.poll() is None:
            now = sum("reload" in line or "replaced" in line for line in self.server.lines)
            if now > done:
                return
            time.sleep(0.05)


def full_disk(drill: Drill) -> None:
    """The disk of the plan cache is full while a reload stores new plans."""
    drill.needs("disk")
    drill.disk.fill()
    drill.reload("first", "third")
    drill.disk.empty()


def read_only_disk(drill: Drill) -> None:
    """The disk can only be read while a reload stores new plans."""
    drill.needs("disk")
    drill.disk.writable(False)
    try:
        drill.reload("third")
    finally:
        drill.disk.writable(True)


def no_more_threads(drill: Drill) -> None:
    """The process may start two more threads, and many clients come at once."""
    with few_threads(drill.pid, 2):
        _burst(drill, connections=24)


def no_more_memory(drill: Drill) -> None:
    """In a container with little memory, clients ask for as large replies as they may, at once.

    The kernel would kill the server at the limit, so its own limits must refuse before.
    """
    drill.needs("memory")
    _burst(drill, connections=16, items=64)


def no_more_files(drill: Drill) -> None:
    """Strangers open more connections than the server may have files, and keep them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * FILES)), hard))
    with _silent(drill, 2 * FILES, b""):
        _burst(drill, connections=8)


def clock_jumps(drill: Drill) -> None:
    """The wall clock jumps a day ahead, and two days back."""
    drill.needs("clock")
    for seconds in (DAY, -DAY, 0):
        drill.clock.jump(seconds)
        time.sleep(drill.seconds / 3)


def clients_killed(drill: Drill) -> None:
    """Clients are killed in mid-call, again and again."""
    ends = time.monotonic() + drill.seconds
    while time.monotonic() < ends:
        callers = Callers(drill.address, 4, "mixed")
        _until(lambda seen=callers: bool(seen.seen["ended"]))
        callers.kill()


def client_stopped(drill: Drill) -> None:
    """A client with streams and calls under way stops (SIGSTOP) and goes on later."""
    callers = Callers(drill.address, 4, "mixed")
    _until(lambda: bool(callers.seen["ended"]))
    callers.process.send_signal(signal.SIGSTOP)
    time.sleep(drill.seconds)
    callers.process.send_signal(signal.SIGCONT)
    drill.end(callers)


def half_open(drill: Drill) -> None:
    """Connections that say nothing, or stop after HTTP/2's preface, and calls without a message."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    never = threading.Event()

    def messages() -> Iterator[bytes]:
        never.wait(drill.seconds + ENDS_WITHIN)
        yield from ()

    with (
        _silent(drill, 20, b""),
        _silent(drill, 20, preface),
        grpc.insecure_channel(drill.address) as channel,
    ):
        extract = channel.stream_unary("/layertap.v1.FeatureService/Extract")
        calls = [extract.future(messages()) for _ in range(40)]
        time.sleep(drill.seconds)
        for call in calls:
            call.cancel()
        never.set()


FAULTS = (
    *(full_disk, read_only_disk, no_more_threads, no_more_memory, no_more_files),
    *(clock_jumps, clients_killed, client_stopped, half_open),
)


def _burst(drill: Drill, connections: int, items: int = 1) -> None:
    """Let so many new clients ask until the fault is over; each call ends in one way or another."""
    x = np.full((items, 3, soaknets.SIDE, soaknets.SIDE), 7, np.float32)
    ends = time.monotonic() + drill.seconds
    faults: list[str] = []

    def ask() -> None:
        while time.monotonic() < ends:
            try:
                with Client(drill.address, timeout=60, shared_memory=False) as client:
                    value = client.extract("a", x, ["third", "burn"])["third"]
            except LayertapError as error:
                if not type(error).__name__.endswith(EXPECTED):
                    faults.append(f"ended with {type(error).__name__}: {error}")
                time.sleep(0.02)
            else:
                if not np.array_equal(value, np.full_like(value, 85)):
                    faults.append(f"a wrong value: {value.ravel()[:3]}")

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, ends + CALLS_END - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        faults.append("never ended")
    if faults:
        raise LayertapError(f"{len(faults)} calls, among them: {faults[0]}")


@contextmanager
def _silent(drill: Drill, count: int, begin: bytes) -> Iterator[None]:
    """Keep so many connections open that send a few bytes and nothing more."""
    host, _, port = drill.address.rpartition(":")
    peers = []
    try:
        for _ in range(count):
            try:
                peer = socket.create_connection((host, int(port)), timeout=1)
                peers.append(peer)
                peer.sendall(begin)
            except OSError:  # The server takes no more, as it may.
                continue
        yield
    finally:
        for peer in peers:
            peer.close()


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not condition() and time.monotonic() < ends:
        time.sleep(0.02)


def drill(seconds: float, names: Sequence[str] = ()) -> dict[str, Any]:
    """Cause the faults of these names, or all, and return the report of each."""
    wanted = [fault for fault in FAULTS if not names or fault.__name__ in names]
    with tempfile.TemporaryDirectory() as folder:
        running = Drill(Path(folder), seconds)
        try:
            return running.run(wanted)
        finally:
            running.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="how long each fault lasts")
    parser.add_argument("--report", type=Path, default=Path("build/chaos.json"))
    parser.add_argument("names", nargs="*", help="faults to cause; default: all")
    options = parser.parse_args(arguments)
    report = drill(options.seconds, options.names)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 1 if any(seen["faults"] for seen in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
