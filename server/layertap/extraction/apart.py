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
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
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
"""Time limit of the child process. Importing torch takes most of the time."""

_POLL_SECONDS = 0.002
"""Seconds that each step waits for the child. Other requests run between the steps."""

_CHILD = """
import io, sys
import torch
given = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
torch.set_num_threads(1)
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
sys.stdout.buffer.write(written.getvalue())
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
        runs: How often it runs on each batch. The first runs only profile it.

    Raises:
        ProgramEndedError: The program raised, ended the process or took too long.
    """
    with _memory() as given, _memory() as answer, _memory() as said:
        given.write(_packed(program, batches, device, runs))
        given.seek(0)
        try:
            child = subprocess.Popen(  # noqa: S603 - this Python, and a program of our own
                [sys.executable, "-P", "-W", "ignore", "-c", _CHILD],
                stdin=given,
                stdout=answer,
                stderr=said,
            )
        except OSError as error:
            raise ProgramEndedError(f"no process could be started: {error.strerror}") from error
        try:
            ends = time.monotonic() + _SECONDS
            while child.poll() is None:
                if time.monotonic() > ends:
                    raise ProgramEndedError(f"it ran for more than {_SECONDS} s")
                time.sleep(_POLL_SECONDS)
                yield
        finally:
            child.kill()
            child.wait()
        if child.returncode:
            raise ProgramEndedError(_how_it_ended(child.returncode, said))
        answer.seek(0)
        values: list[Values] = torch.load(io.BytesIO(answer.read()), weights_only=True)
        return values


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
