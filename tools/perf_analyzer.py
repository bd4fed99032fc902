"""Run NVIDIA's perf_analyzer, unmodified, against a served resnet18 without weights.

Run it by ``make perf-analyzer``. The program comes from a wheel, and of what it is linked with the
CUDA runtime from another and libb64 from Debian; all are kept in ``build/perf-analyzer``. It runs
four times: a concurrency sweep, over a stream, with system shared memory, and with a small model
that takes two inputs. Exits with 0 only if each of them measured something.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
BUILD = HOME / "build" / "perf-analyzer"
REQUIREMENTS = HOME / "tools" / "perf-requirements.txt"
DEBIAN_PACKAGE = "libb64-0d"

MODEL = "resnet18"
TWO_INPUTS = "declared_mask"
SERVE = [
    *("layertap", "serve", MODEL, f"severalnets:{TWO_INPUTS}", "--weights", "random"),
    *("--port", "0", "--metrics-port", "-1", "--plan-cache", "off", "--allow-client-shm"),
]
# The metadata have -1 for the height and width of images, which are free.
IMAGES = ["-m", MODEL, "--shape", "x:3,224,224"]
TEXTS = BUILD / "texts.json"
RUNS = {
    "a concurrency sweep": [*IMAGES, "--concurrency-range", "1:4"],
    "over a stream": [*IMAGES, "--concurrency-range", "1:4:3", "--streaming", "--async"],
    "system shared memory": [*IMAGES, "--concurrency-range", "1:4:3", "--shared-memory=system"],
    "two inputs": ["-m", TWO_INPUTS, "--concurrency-range", "1:4:3", "--input-data", str(TEXTS)],
}
MEASURED = re.compile(r"^Concurrency: \d+, throughput: (\d+(\.\d+)?) infer/sec", re.MULTILINE)
LIMIT_SECONDS = 300


def fetch() -> None:
    """Download and unpack what is not there yet."""
    if (BUILD / ".fetched").exists():
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    _run([*pip, "--dest", str(BUILD), "-r", str(REQUIREMENTS)])
    _run(["apt-get", "download", "-qq", DEBIAN_PACKAGE])
    for wheel in BUILD.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(BUILD / "root")
    for package in BUILD.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(BUILD / "root")])
    _found("perf_analyzer").chmod(0o755)
    (BUILD / ".fetched").touch()


@contextmanager
def served() -> Iterator[str]:
    """Serve the model on a free port and yield the address."""
    log = BUILD / "serve.log"
    env = {**os.environ, "PYTHONPATH": str(HOME / "tests")}
    with log.open("w", encoding="utf-8") as out:
        server = subprocess.Popen([sys.executable, "-m", *SERVE], stderr=out, env=env)
    try:
        yield _address(server, log)
    finally:
        server.terminate()
        server.wait(60)


def measure(address: str, options: list[str], window_ms: int) -> str:
    """Run perf_analyzer once and return what it printed; raise SystemExit where it failed."""
    libraries = {str(_found(name).parent) for name in ("libcudart.so.*", "libb64.so.*")}
    command = [
        *(str(_found("perf_analyzer")), "-i", "grpc", "-u", address),
        # On a machine that others share as well, latencies seldom settle to the default 10 %.
        *("--measurement-interval", str(window_ms), "--stability-percentage", "50"),
        *options,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(sorted(libraries))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    if done.returncode or not succeeded(done.stdout):
        raise SystemExit(f"{done.stdout}\nperf_analyzer failed ({done.returncode}): {options}")
    return done.stdout


def succeeded(text: str) -> bool:
    """Tell whether perf_analyzer's output has throughputs, and none of them is zero."""
    rates = [float(rate) for rate, _ in MEASURED.findall(text)]
    return bool(rates) and min(rates) > 0


def main() -> int:
    """Measure in each way, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window-ms", type=int, default=2000, help="one measurement's length")
    options = parser.parse_args()
    fetch()
    TEXTS.write_text(json.dumps({"data": [_texts(count) for count in (16, 9, 3)]}), "utf-8")
    with served() as address:
        for name, chosen in RUNS.items():
            print(f"==> {name}: perf_analyzer {' '.join(chosen)}", flush=True)
            print(measure(address, chosen, options.window_ms), flush=True)
    print(f"{len(RUNS)} passed, 0 failed")
    return 0


def _texts(count: int) -> dict[str, dict[str, list[int]]]:
    """Return one padded item of both inputs, of which so many tokens count."""
    ids = [(7 * index) % 49 + 1 if index < count else 0 for index in range(16)]
    mask = [int(index < count) for index in range(16)]
    return {
        name: {"content": values, "shape": [16]}
        for name, values in (("input_ids", ids), ("attention_mask", mask))
    }


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server serves, and return where."""
    try:
        while server.poll() is None:
            said = re.search(r"serving .+ on (\S+)$", log.read_text("utf-8"), re.MULTILINE)
            if said:
                return said[1]
            try:
                server.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    except BaseException:
        server.kill()
        raise
    raise SystemExit(f"the server ended: {log.read_text('utf-8')}")


def _found(name: str) -> Path:
    file = next((BUILD / "root").rglob(name), None)
    if file is None:
        raise SystemExit(f"{name}: not in what was fetched to {BUILD}; it is for Linux on x86-64")
    return file


def _run(command: list[str]) -> None:
    if subprocess.run(command, cwd=BUILD, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
