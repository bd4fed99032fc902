"""Processes in which PyTorch is imported already, forked from one that waits for that.

Importing PyTorch takes a server longer than most tests need it. A fork is a process of its own
like any other: it gets signals, may be killed, and has its own memory, threads and descriptors.
What it is not is a start from nothing: tests of what happens before, during or by the imports, or
of a process's limits, need a real one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

# Its standard input is a socket, whose messages are arguments of `python -m layertap` and the files
# for standard output and error. It answers with process ids and, as they end, with exit codes.
_SERVER = """
import gc, json, os, runpy, select, socket, sys
import torchvision
import layertap.app.lifecycle, layertap.cli.main, layertap.cli.serve, layertap.engine
import layertap.models.compiler_import
layertap.models.compiler_import.import_compiler()  # Two seconds that each fork would take.
control = socket.socket(fileno=0)
gc.collect()
gc.freeze()  # What is imported stays shared with the forks: their collectors don't touch it.
control.send(b"[]")
while True:
    readable, _, _ = select.select([control], [], [], 0.02)
    if readable:
        message, files, *_ = socket.recv_fds(control, 1 << 16, 2)
        if not message:
            os._exit(0)
        child = os.fork()
        if not child:
            break
        for file in files:
            os.close(file)
        control.send(json.dumps(["begun", child]).encode())
    try:
        ended, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        continue
    if ended:
        control.send(json.dumps([ended, os.waitstatus_to_exitcode(status)]).encode())
nothing = os.open(os.devnull, os.O_RDONLY)
for number, file in enumerate([nothing, *files]):
    os.dup2(file, number)
    os.close(file)
control.detach()
arguments, folder, environment = json.loads(message)
os.environ.update(environment)
os.chdir(folder)
sys.path[0] = folder
sys.argv = ["layertap", *arguments]
runpy.run_module("layertap", run_name="__main__", alter_sys=True)
"""


class Warm:
    """The process that waits, and forks of it.

    Args:
        environment: The environment of all of them.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _SERVER], stdin=theirs, env=environment
            )
        self._socket.settimeout(120)
        self._codes: dict[int, int] = {}
        assert self._socket.recv(1 << 10), "the process that imports PyTorch has ended"
        atexit.register(self._close)

    def fork(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: int,
        error: int,
    ) -> int:
        """Run ``layertap`` with arguments in a folder; return the process's id.

        Args:
            arguments: Its arguments.
            folder: The folder to run in.
            environment: Variables besides those of the process that waits. Those that libraries
                read when they are imported have no effect.
            output: A file descriptor for its standard output.
            error: Likewise for what it writes to stderr.
        """
        self._socket.setblocking(True)
        message = json.dumps([[*arguments], str(folder), {**environment}]).encode()
        socket.send_fds(self._socket, [message], [output, error])
        while True:
            which, number = json.loads(self._socket.recv(1 << 10))
            if which == "begun":
                self._codes.pop(number, None)
                return int(number)
            self._codes[which] = number

    def code(self, process: int) -> int | None:
        """Return the exit code of a process as Popen gives it; None while it runs."""
        self._socket.setblocking(False)
        while process not in self._codes:
            try:
                message = self._socket.recv(1 << 10)
            except BlockingIOError:
                return None
            assert message, "the process that waits has ended"
            ended, code = json.loads(message)
            self._codes[ended] = code
        return self._codes[process]

    def _close(self) -> None:
        self._socket.close()
        self._process.wait()


@cache
def warm(*environment: tuple[str, str]) -> Warm:
    """Return the waiting process of an environment, as sorted pairs; it is started once."""
    return Warm(dict(environment))


class Forked:
    """A fork that runs ``layertap``, with what of Popen's interface tests use.

    Args:
        arguments: Its arguments.
        environment: The environment of the process that it is forked from.
        folder: The folder to run in.
        more: Further variables; see ``Warm.fork``.
        output: A file descriptor for its standard output; this process's if not given.
        error: Likewise for what it writes to stderr; a pipe, ``stderr``, if not given.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        more: Mapping[str, str] | None = None,
        output: int = 1,
        error: int | None = None,
    ) -> None:
        self._warm = warm(*sorted(environment.items()))
        self.stderr: IO[str] | None = None
        theirs = error
        if theirs is None:
            read, theirs = os.pipe()
            self.stderr = os.fdopen(read, encoding="utf-8")
        self.pid = self._warm.fork(arguments, folder, more or {}, output, theirs)
        if error is None:
            os.close(theirs)

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._warm.code(self.pid)

    def wait(self, timeout: float) -> int:
        """Wait until it has ended and return the exit code."""
        ends = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired("layertap", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)
