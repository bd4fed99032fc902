"""Compiles packages of AOTInductor, and runs them for the first time, in processes of their own.

Note [Processes of their own]
    Compiling takes seconds to minutes of CPU time, most of it in Python with the GIL held, so in
    the server's process every request would be slower for so long. And a package is native code: a
    wrong one may end the process that loads or runs it. So it is compiled in one child process, and
    loaded and run on several batches in a second one, whose values are compared with the reference
    before the server's process loads it. Both have a lower priority than the server.

    They are new processes, not forked ones: the server has threads. What they are given and what
    they answer are files in a folder that only this user can read, which is removed at the end.

Note [What is compiled]
    The number of threads is not part of the code (``dynamic_threads``): a package uses as many as
    the thread that runs it. The code is for the processor of this machine (``-march=native``). So
    the name of a stored package depends on the processor's features.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layertap.extraction.base import Values
from layertap.extraction.own_words import compiler_words
from layertap.extraction.package import InputShape, LoadedPackage
from layertap.extraction.pause import Pause
from layertap.extraction.plan_folder import user_cache
from layertap.models import Batch

__all__ = ["SideProcessError", "compile_package", "compiler", "main", "run_package"]

COMPILE_SECONDS = 1800.0
"""Time limit of a compilation."""

RUN_SECONDS = 300.0
"""Time limit of the first run of a package, with the imports of its process."""

_POLL_SECONDS = 0.05
_NICE = 10

_CHILD = "import sys; sys.path[:] = {path!r}; from {module} import main; main({task!r}, {folder!r})"

_PROGRAM, _LIBRARY, _FACTS = "program.pt2", "package.so", "facts.json"
_GIVEN, _ANSWER, _ERROR = "given.pt", "answer.pt", "error.txt"


class SideProcessError(Exception):
    """A child process failed; the message says how, as a clause."""


def compiler() -> str:
    """Return the path of the C++ compiler that is used; empty if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++") or ""


def compile_package(
    program: torch.export.ExportedProgram,
) -> Generator[Pause, None, tuple[bytes, dict[str, str]]]:
    """Compile an exported program in a child process; yield while it works.

    Returns:
        The shared library, and its constants: by their name in the library, their name in the
        program.

    Raises:
        SideProcessError: It can't be compiled.
    """
    with _folder() as folder:
        # Not directly to a file: on a full disk, the destructor of torch's writer ends the process.
        with (folder / _PROGRAM).open("wb") as file:
            torch.export.save(program, file)
        yield from _run("compile", folder, COMPILE_SECONDS)
        facts = json.loads((folder / _FACTS).read_bytes())
        return (folder / _LIBRARY).read_bytes(), facts


def run_package(
    library: bytes,
    constants: Mapping[str, torch.Tensor],
    inputs: Sequence[InputShape],
    outputs: int,
    batches: Sequence[Batch],
) -> Generator[Pause, None, list[Values]]:
    """Load a package in a child process and run it on batches; yield meanwhile.

    Args:
        library: Its library.
        constants: A tensor for each of its constants.
        inputs: What it takes.
        outputs: The number of its outputs.
        batches: The batches.

    Returns:
        Its values for each batch.

    Raises:
        SideProcessError: The package can't be loaded, or failed, or ended the process.
    """
    with _folder() as folder:
        (folder / _LIBRARY).write_bytes(library)
        given = {
            "constants": dict(constants),
            "inputs": [asdict(each) for each in inputs],
            "outputs": outputs,
            "batches": [list(batch.values()) for batch in batches],
        }
        with (folder / _GIVEN).open("wb") as file:
            torch.save(given, file)
        yield from _run("run", folder, RUN_SECONDS)
        values: list[Values] = torch.load(folder / _ANSWER, weights_only=True)
        return values


@contextmanager
def _folder() -> Any:
    with tempfile.TemporaryDirectory(prefix="layertap-package-") as name:
        yield Path(name)


def _run(task: str, folder: Path, seconds: float) -> Generator[Pause, None, None]:
    """Run a task of ``main`` in a child process, and yield while it works."""
    code = _CHILD.format(path=sys.path, module=__name__, task=task, folder=str(folder))
    try:
        process = subprocess.Popen(  # noqa: S603 - this Python, and code of our own
            [sys.executable, "-P", "-W", "ignore", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
    except OSError as error:
        raise SideProcessError(f"no process could be started: {error.strerror}") from error
    ends = time.monotonic() + seconds
    try:
        while process.poll() is None:
            if time.monotonic() > ends:
                raise SideProcessError(f"it took more than {seconds:.0f} s")
            yield Pause(_POLL_SECONDS)
    finally:
        # Also the compilers that it started.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise SideProcessError(f"its process was killed by {name}")
    if process.returncode:
        with suppress(OSError):
            raise SideProcessError((folder / _ERROR).read_text("utf-8"))
        raise SideProcessError(f"its process ended with code {process.returncode}")


# What follows runs in a child process.


def main(task: str, folder: str) -> None:
    """Do a task in this process, which is a child process of a server, and end it.

    Args:
        task: ``"compile"`` or ``"run"``.
        folder: The folder with what is given, and for the answer.
    """
    os.nice(_NICE)
    place = Path(folder)
    try:
        with torch.inference_mode():
            _TASKS[task](place)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent process reports it
        traceback.print_exc()
        (place / _ERROR).write_text(compiler_words(error), "utf-8")
        os._exit(1)
    os._exit(0)


def _compile(folder: Path) -> None:
    headers = _headers()
    os.environ["TMPDIR"] = str(folder)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # When it is imported, torch decides to keep precompiled headers where temporary files are.
    tempfile.tempdir = str(headers or folder)
    import torch._inductor.codecache  # noqa: PLC0415
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415

    tempfile.tempdir = str(folder)

    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.precompile_headers": headers is not None,
        "cpp.dynamic_threads": True,
        # Otherwise loops are not parallel at all where this process has one core.
        "cpp.threads": max(2, os.cpu_count() or 1),
    }
    with torch.inference_mode(False), torch.no_grad():
        program = torch.export.load(folder / _PROGRAM)
        package = aoti_compile_and_package(
            program, package_path=str(folder / "package.pt2"), inductor_configs=options
        )
    library = _library_of(Path(package))
    (folder / _LIBRARY).write_bytes(library)
    # A library that can't even be loaded ends this process here, not the server's.
    (folder / _FACTS).write_text(json.dumps(LoadedPackage(library).constants()), "utf-8")


def _library_of(package: Path) -> bytes:
    """Return the shared library of a package, which must need nothing else of it.

    Operations without a C interface are called through an object of libtorch that only torch's own
    loader can make. The package then has a list of them.
    """
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        for name in names:
            if name.endswith(".json") and not name.endswith("_metadata.json"):
                nodes = json.loads(archive.read(name)).get("nodes", ())
                if nodes:
                    called = str(nodes[0].get("node", {}).get("target", "an operation"))
                    called = called.removeprefix("torch.ops.")
                    raise RuntimeError(f"{called} can't be called from a package")
        (library,) = (name for name in names if name.endswith(".so"))
        return archive.read(library)


def _headers() -> Path | None:
    """Return the folder for precompiled headers, which take most of the time; None if none is safe.

    They are used by the compiler only, and recognised by a digest of their content and options.
    """
    try:
        folder = user_cache() / "headers"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: the user has no home.
        return None
    safe = state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder if safe and os.access(folder, os.W_OK) else None


def _run_given(folder: Path) -> None:
    given = torch.load(folder / _GIVEN, weights_only=True)
    package = LoadedPackage((folder / _LIBRARY).read_bytes())
    inputs = [InputShape(**each) for each in given["inputs"]]
    package.bind(given["constants"], inputs, given["outputs"])
    values = [package.run(batch) for batch in given["batches"]]
    with (folder / _ANSWER).open("wb") as file:
        torch.save(values, file)


_TASKS = {"compile": _compile, "run": _run_given}
