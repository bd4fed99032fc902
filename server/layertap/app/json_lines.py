"""Turns the output of other code on stderr and stdout into JSON log records, one per line.

gRPC's core, PyTorch's C++ and a model's own ``print`` write plain text past Python's logging. Where
logs are JSON, ``capture_output`` sends that text through a small process that runs this file, reads
lines and writes a record for each.

Note [A process of its own]
    A thread would be simpler, but the most important output is written by a process that is about
    to end: the message of C++ code before it aborts. Another process can still read it afterwards.

    It ends when all writers of its pipe have closed it, and ignores the signals that stop the
    server, since those reach all processes of a terminal or of a systemd unit.

Needs only the standard library, and imports nothing of layertap: it starts in a few milliseconds
and takes little memory.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO, Any, TextIO

__all__ = ["capture_output", "json_line"]

LINE_BYTES = 16384
"""A longer line becomes several records."""

# How gRPC's core (absl) and PyTorch's C++ (c10) begin a line: I0000 00:00:1732612345.1, [W1126 …
_LEVEL = re.compile(r"\[?([IWEF])\d{4} \d\d:")
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}


def json_line(when: datetime, level: str, logger: str, message: str, **fields: Any) -> str:
    """Return a log record as one JSON object in ASCII, without the end of the line."""
    entry: dict[str, Any] = {
        "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "logger": logger,
        "message": message,
        **fields,
    }
    return json.dumps(entry, default=str)


def capture_output() -> TextIO:
    """Make JSON records of all that this process writes to file descriptors 1 and 2 from now on.

    Returns:
        The former stderr, line by line, for records that are JSON already.

    Raises:
        OSError: If no process can be started for it; nothing has changed then.
    """
    # Whole lines and no buffer, as of stderr itself; the descriptor is the log's until the end.
    log = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    try:
        process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        log.close()
        raise
    pipe = process.stdin
    if pipe is None:
        raise OSError("no pipe")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    pipe.close()
    # It outlives us, so nobody waits for it.
    process.returncode = 0
    return log


def _record(line: bytes) -> str:
    text = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
    found = _LEVEL.match(text)
    level = _LEVELS[found[1]] if found else "warning"
    return json_line(datetime.now(UTC), level, "output", text)


def _copy(source: IO[bytes], target: IO[str]) -> None:
    """Write a record for each line that has any text, until the source ends."""
    while line := source.readline(LINE_BYTES):
        if line.strip():
            target.write(_record(line) + "\n")
            target.flush()


def _main() -> None:
    """Read lines from stdin, write records to stdout."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # The reader of the log has closed it.
        _copy(sys.stdin.buffer, sys.stdout)
    # Not by the interpreter's own end, which would complain about a closed stdout.
    os._exit(0)


if __name__ == "__main__":
    _main()
