"""Converts the output of other code on stderr and stdout to JSON log records, one per line.

gRPC's core, PyTorch's C++ code and a model's own ``print`` write plain text, bypassing Python's
logging. If logs are JSON, ``capture_output`` sends that text through a small process that runs this
file, reads lines and writes a record for each.

Note [A process of its own]
    A thread would be simpler, but the most important output is written by a process that is about
    to end: the message of C++ code before it aborts. Another process can still read it afterwards.

    That process ends when all writers of its pipe have closed it. It ignores the signals that stop
    the server, because a terminal or a systemd unit sends these to all its processes.

It needs only the standard library and imports nothing of layertap, so it starts in a few
milliseconds and takes little memory.
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
"""Maximum length of a record's text; a longer line becomes several records."""

# How gRPC's core (absl) and PyTorch's C++ code (c10) begin a line: I0000 00:00:1732612345.1, [W1126
_LEVEL = re.compile(r"\[?([IWEF])\d{4} \d\d:")
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}


def json_line(when: datetime, level: str, logger: str, message: str, **fields: Any) -> str:
    """Return a log record as one JSON object in ASCII, without a newline."""
    entry: dict[str, Any] = {
        "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "logger": logger,
        "message": message,
        **fields,
    }
    return json.dumps(entry, default=str)


def capture_output() -> TextIO:
    """Make JSON records of everything that this process writes to file descriptors 1 and 2.

    Returns:
        The former stderr, line-buffered, for records that are already JSON.

    Raises:
        OSError: If no process can be started for it; then nothing has changed.
    """
    # Line-buffered, like stderr itself; the descriptor stays open until the process ends.
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
    # The process outlives us, so we don't wait for it.
    process.returncode = 0
    return log


def _record(line: bytes) -> str:
    text = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
    found = _LEVEL.match(text)
    level = _LEVELS[found[1]] if found else "warning"
    return json_line(datetime.now(UTC), level, "output", text)


def _copy(source: IO[bytes], target: IO[str]) -> None:
    """Write a record for each line that isn't blank, until the source ends."""
    while line := source.readline(LINE_BYTES):
        if line.strip():
            target.write(_record(line) + "\n")
            target.flush()


def _main() -> None:
    """Read lines from stdin and write records to stdout."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # The log's reader has closed it.
        _copy(sys.stdin.buffer, sys.stdout)
    # Exit without the interpreter's own shutdown, which would complain about a closed stdout.
    os._exit(0)


if __name__ == "__main__":
    _main()
