"""Generate the message modules under ``server/layertap`` from ``proto/``, or check them.

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
PACKAGES = {
    "layertap/v1": "layertap/v1",
    "inference": "layertap/inference",
    "grpc/health/v1": "layertap/grpc_health",
    "grpc/reflection/v1": "layertap/grpc_reflection",
    "grpc/reflection/v1alpha": "layertap/grpc_reflection",
}
"""Folders of ``proto``, and where in ``server`` their code goes."""


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
    """Write messages and their types for every file.

    No stubs: the servicers register their handlers themselves, and the client calls by path.
    """
    for file in sorted(file for folder in PACKAGES for file in (proto / folder).glob("*.proto")):
        plugins = [f"--python_out={out}", f"--pyi_out={out}"]
        # Relative, because the path that protoc is given ends up in the generated code.
        name = file.relative_to(proto).as_posix()
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", *plugins, name]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"protoc refused {file}")


def fresh(out: Path) -> dict[str, bytes]:
    """Return what protoc wrote, adapted, by where in ``server`` it belongs."""
    return {
        f"{package}/{file.name}": adapted(file.read_bytes())
        for folder, package in PACKAGES.items()
        for file in (out / folder).glob("*_pb2*.py*")
    }


def adapted(code: bytes) -> bytes:
    """Return generated code with our package's imports and our own descriptor pool.

    protoc imports by the .proto's folder, which for the Open Inference Protocol would be a package
    ``inference`` that is not ours to take: its imports are those of ``layertap.inference``. And it
    registers messages in the pool of the whole process; ``layertap.descriptors`` says why we don't.
    """
    return (
        code.replace(b"from inference import", b"from layertap.inference import")
        .replace(
            b"from google.protobuf import descriptor_pool as _descriptor_pool\n",
            b"from layertap.descriptors import POOL as _pool\n",
        )
        .replace(b"_descriptor_pool.Default()", b"_pool")
    )


def committed(server: Path) -> dict[str, bytes]:
    """Read the committed files; each ``__init__.py`` is written by hand."""
    return {
        f"{package}/{file.name}": file.read_bytes()
        for package in PACKAGES.values()
        for file in (server / package).glob("*_pb2*.py*")
    }


def main() -> int:
    """Generate, or with ``--check`` compare; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stale")
    parser.add_argument("--root", type=Path, default=HOME, help="the tree to work on")
    options = parser.parse_args()
    if (installed := installed_generator()) != (pinned := pinned_generator()):
        print(f"the generator is grpcio-tools {pinned}, here is {installed}: run `make gen`")
        return 1

    target = options.root / "server"
    with tempfile.TemporaryDirectory() as scratch:
        generate(options.root / "proto", Path(scratch))
        made, kept = fresh(Path(scratch)), committed(target)
    stale = sorted(name for name in made | kept if made.get(name) != kept.get(name))
    if options.check:
        for name in stale:
            print(f"stale: {target / name}")
        if stale:
            print("run `make gen` and commit the result")
        return 1 if stale else 0

    for name in stale:
        if name in made:
            (target / name).write_bytes(made[name])
        else:
            (target / name).unlink()
        print(f"wrote: {target / name}" if name in made else f"removed: {target / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
