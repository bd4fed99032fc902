"""Generate ``server/layertap/v1`` from ``proto/``, or check that it is up to date.

Run it by ``make gen`` and ``make check``, which use the environment with the pinned generator: the
version of protoc decides which protobuf runtimes the result runs on, so any other one is refused.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
REQUIREMENTS = HOME / "tools" / "gen-requirements.txt"
PACKAGE = Path("layertap") / "v1"


def pinned_generator() -> str:
    """Return the version of grpcio-tools that writes the committed code."""
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name, _, pinned = line.partition("==")
        if name == "grpcio-tools":
            return pinned
    raise SystemExit(f"{REQUIREMENTS} pins no grpcio-tools")


def installed_generator() -> str:
    """Return the version of grpcio-tools in the running environment."""
    try:
        return version("grpcio-tools")
    except PackageNotFoundError:
        return "none"


def generate(proto: Path, out: Path) -> None:
    """Write messages and their types for every file, and stubs for those with a service."""
    files = sorted((proto / PACKAGE).glob("*.proto"))
    for file in files:
        plugins = [f"--python_out={out}", f"--pyi_out={out}"]
        # protoc writes an empty *_pb2_grpc.py for a file without a service.
        if any(line.startswith("service ") for line in file.read_text("utf-8").splitlines()):
            plugins.append(f"--grpc_python_out={out}")
        # Relative, because the path that protoc is given ends up in the generated code.
        name = file.relative_to(proto).as_posix()
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", *plugins, name]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"protoc refused {file}")


def contents(folder: Path) -> dict[str, bytes]:
    """Read the generated files of a folder; its ``__init__.py`` is written by hand."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*_pb2*.py*"))}


def main() -> int:
    """Generate, or with ``--check`` compare; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stale")
    parser.add_argument("--root", type=Path, default=HOME, help="the tree to work on")
    options = parser.parse_args()
    if (installed := installed_generator()) != (pinned := pinned_generator()):
        print(f"the generator is grpcio-tools {pinned}, here is {installed}: run `make gen`")
        return 1

    target = options.root / "server" / PACKAGE
    with tempfile.TemporaryDirectory() as scratch:
        generate(options.root / "proto", Path(scratch))
        fresh, kept = contents(Path(scratch) / PACKAGE), contents(target)
    stale = sorted(name for name in fresh | kept if fresh.get(name) != kept.get(name))
    if options.check:
        for name in stale:
            print(f"stale: {target / name}")
        if stale:
            print("run `make gen` and commit the result")
        return 1 if stale else 0

    for name in stale:
        if name in fresh:
            (target / name).write_bytes(fresh[name])
        else:
            (target / name).unlink()
        print(f"wrote: {target / name}" if name in fresh else f"removed: {target / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
