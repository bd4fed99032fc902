"""Runs a compiled program in a child process first, if its native code could end the process.

Note [Unchecked operations]
    Most of torch's operations check their arguments and raise. Recurrent operations don't: the
    sizes of a hidden state are checked in the Python code of ``nn.LSTM``, which a compiled program
    no longer contains. In a trace, a state that was made for a batch of one is a constant. When
    the program runs on a batch of two, the native code writes past the end of that state and
    sooner or later aborts the process, without an exception. So a program that has such
    operations, or operations of libraries other than torch and torchvision, is optimised and run
    for the first time in a child process, at several batch sizes. The child returns the values,
    which are compared with the reference. Only a program that passes this runs in the server.

Note [Children are forked by a helper]
    Importing torch takes seconds, and a model may need several such runs. So a helper process
    imports torch once and forks a child for each program. The server can't fork them itself,
    because it has threads. A helper that gets no program for _IDLE_SECONDS is ended.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import IO

import torch

from layertap.extraction.base import Values
from layertap.models import Batch
from layertap.silence import warnings_ignored

__all__ = ["ProgramEndedError", "may_end_the_process", "run_apart"]

_UNCHECKED = frozenset(
    f"aten::{name}"
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
                 "rnn_relu_cell", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn",
                 "quantized_lstm_cell", "quantized_gru_cell")
)  # fmt: skip

_CHECKED_NAMESPACES = ("aten", "prim", "torchvision", "inductor")

_SECONDS = 120
"""Time limit of a run. The first run of a helper includes the import of torch."""

_POLL_SECONDS = 0.002
"""Seconds that each step waits for the child. Other requests run between the steps."""

_IDLE_SECONDS = 20.0
"""Seconds for which a helper waits for another program before it is ended."""

# Its standard input is a socket. A message has the code that a child runs, and the files for the
# child's standard streams; the answer is the child's exit code. An alarm ends the child if no other
# process does.
_HELPER = """
import os, signal, socket, struct, sys
import torch
server = socket.socket(fileno=0)
while True:
    code, files, *_ = socket.recv_fds(server, 1 << 16, 3)
    if not code:
        os._exit(0)
    child = os.fork()
    if not child:
        for number, file in enumerate(files):
            os.dup2(file, number)
        signal.alarm(int(sys.argv[1]))
        exec(code.decode(), {})
        os._exit(0)
    for file in files:
        os.close(file)
    server.send(struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""

_CHILD = """
import io
import torch
with open(0, "rb") as given:
    given = torch.load(io.BytesIO(given.read()), weights_only=True)
torch.set_num_threads(1)
if torch.device(given["device"]).type == "cpu":  # As in the server; see kinds.torchscript.
    torch._C._set_graph_executor_optimize(False)
stored = io.BytesIO(given["program"].numpy().tobytes())
values = []
with torch.inference_mode():
    program = torch.jit.load(stored, map_location=given["device"])
    program = torch.jit.optimize_for_inference(program)
    for tensors in given["batches"]:
        for _ in range(given["runs"]):
            made = program(*(tensor.to(given["device"]) for tensor in tensors))
        values.append([value.cpu() for value in made])
written = io.BytesIO()
torch.save(values, written)
with open(1, "wb") as answer:
    answer.write(written.getvalue())
"""


class ProgramEndedError(Exception):
    """A program raised, or ended its process; the message says how."""


def may_end_the_process(program: torch.jit.ScriptModule) -> bool:
    """Return whether a program has operations that don't check their arguments.

    See Note [Unchecked operations].
    """
    return any(
        kind in _UNCHECKED or kind.split("::", 1)[0] not in _CHECKED_NAMESPACES
        for kind in _kinds(program.inlined_graph)
    )


def _kinds(block: torch.Graph | torch.Block) -> Iterator[str]:
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _kinds(inner)


def run_apart(
    program: torch.jit.ScriptModule,
    batches: Sequence[Batch],
    device: torch.device,
    runs: int,
) -> Generator[None, None, list[Values]]:
    """Run a program in a child process and return its values for each batch; yield while it runs.

    Args:
        program: The traced and frozen program; it is not changed.
        batches: The batches to run it on, which may be on any device.
        device: The device to run it on.
        runs: How often it runs on each batch, so that it is optimised as in the server.

    Raises:
        ProgramEndedError: The program raised, ended the process or took too long.
    """
    with _memory() as given, _memory() as answer, _memory() as said:
        given.write(_packed(program, batches, device, runs))
        given.seek(0)
        helper = _free_helper()
        try:
            code = yield from helper.run(_CHILD, (given, answer, said))
        except BaseException:
            helper.end()
            raise
        _keep(helper)
        if code:
            raise ProgramEndedError(_how_it_ended(code, said))
        answer.seek(0)
        values: list[Values] = torch.load(io.BytesIO(answer.read()), weights_only=True)
        return values


class _Helper:
    """A process that has imported torch and forks a child for one run at a time.

    See Note [Children are forked by a helper].

    Raises:
        ProgramEndedError: No process could be started.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._timer: threading.Timer | None = None
        # SOCK_SEQPACKET keeps messages apart and can carry files.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - this Python, and code of our own
                    [sys.executable, "-P", "-W", "ignore", "-c", _HELPER, str(_SECONDS)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    process_group=0,
                )
            except OSError as error:
                self._socket.close()
                reason = f"no process could be started: {error.strerror}"
                raise ProgramEndedError(reason) from error

    def run(self, code: str, files: Sequence[IO[bytes]]) -> Generator[None, None, int]:
        """Run code in a child with these standard streams, in steps; return its exit code.

        Raises:
            ProgramEndedError: It took too long or the helper ended; don't use the helper again.
        """
        ends = time.monotonic() + _SECONDS
        self._socket.settimeout(_POLL_SECONDS)
        with suppress(BrokenPipeError):  # The answer will be missing.
            socket.send_fds(self._socket, [code.encode()], [file.fileno() for file in files])
        while True:
            try:
                answer = self._socket.recv(struct.calcsize("i"))
            except TimeoutError:
                answer = None
            except ConnectionError:
                answer = b""
            if answer:
                exit_code: int
                (exit_code,) = struct.unpack("i", answer)
                return exit_code
            if answer is not None:
                raise ProgramEndedError("no child could be started")
            if time.monotonic() > ends:
                raise ProgramEndedError(f"it ran for more than {_SECONDS} s")
            yield

    @property
    def alive(self) -> bool:
        """Whether the helper is still running."""
        return self._process.poll() is None

    def end_later(self) -> None:
        """End the helper if it is not used for a while."""
        self._timer = threading.Timer(_IDLE_SECONDS, _end_idle, (self,))
        self._timer.daemon = True
        self._timer.start()

    def stay(self) -> None:
        """Cancel ``end_later``."""
        if self._timer is not None:
            self._timer.cancel()

    def end(self) -> None:
        """End the helper, and its child if there is one."""
        self.stay()
        self._socket.close()
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


_idle: list[_Helper] = []
"""Helpers of this process that wait for a program."""

_lock = threading.Lock()
"""Guards ``_idle``."""


def _free_helper() -> _Helper:
    """Return a waiting helper or a new one; the caller must keep or end it."""
    with _lock:
        while _idle:
            helper = _idle.pop()
            if helper.owner != os.getpid():
                continue  # It belongs to the parent, from which this process was forked.
            helper.stay()
            if helper.alive:
                return helper
            helper.end()
    return _Helper()


def _keep(helper: _Helper) -> None:
    """Keep a helper for some seconds, for the next program."""
    with _lock:
        try:
            helper.end_later()
        except RuntimeError:  # The system refuses a thread.
            helper.end()
        else:
            _idle.append(helper)


def _end_idle(helper: _Helper) -> None:
    with _lock:
        if helper not in _idle:
            return  # It has just been taken.
        _idle.remove(helper)
    helper.end()


@atexit.register
def _end_all() -> None:
    with _lock:
        for helper in _idle:
            if helper.owner == os.getpid():
                helper.end()
        _idle.clear()


def _packed(
    program: torch.jit.ScriptModule,
    batches: Sequence[Batch],
    device: torch.device,
    runs: int,
) -> bytes:
    stored, packed = io.BytesIO(), io.BytesIO()
    with warnings_ignored():
        torch.jit.save(program, stored)
        content = {
            "program": torch.frombuffer(bytearray(stored.getvalue()), dtype=torch.uint8),
            "batches": [[tensor.cpu() for tensor in batch.values()] for batch in batches],
            "device": str(device),
            "runs": runs,
        }
        torch.save(content, packed)
    return packed.getvalue()


def _memory() -> IO[bytes]:
    """Return a file in memory if possible, as a disk may be full; else a temporary file."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("layertap-program"), "w+b")
    return tempfile.TemporaryFile()


def _how_it_ended(code: int, said: IO[bytes]) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"its process ended with code {code}"
