"""Do as many answers come out when 256 callers ask again at once as when 8 callers ask?

A server on its own process is called by a load generator in Go (tools/storm), which shares its
cores. Every caller sends its photograph again as soon as the last call ended, answered or refused,
and obeys no back-off. Each answer is held against the bytes that the server gave before the storm,
and those against PyTorch's own.

    python benchmarks/bench_storm.py --generator build/storm

Exit code 1 where an answer was wrong, a call ended in an undocumented way, the rate at 256 callers
is below 0.8 of that at 8, or the 99th percentile of answered calls is over 3 times that at 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import common
from layertap import Client
from layertap.client.requests import request_fields
from layertap.v1 import feature_service_pb2
from layertap.wire.messages import encode_request

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "images" / "grace_hopper.jpg"
CALLERS = (8, 64, 256)
RATE = 0.8
P99 = 3.0
EXTRACTOR = "torchscript"  # AUTO may switch between two runs, and values differ in their last bit.


@contextmanager
def serving(model: str, layer: str, flags: Sequence[str]) -> Iterator[str]:
    """Serve a model from a process of its own; yield its address once it is ready."""
    command = [sys.executable, "-m", "layertap", "serve", model, "--weights", "random"]
    command += ["--layers", layer, "--port", "0", "--metrics-port", "-1", "--plan-cache", "off"]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = next(line for line in process.stderr if "serving" in line).split()[-1]
        # Whatever it says from now on must not fill the pipe.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        try:
            yield address
        finally:
            process.terminate()
            process.wait()
            reader.join()


def prepare(address: str, model: str, layer: str, folder: Path) -> list[str]:
    """Write the request and the bytes of its answer; return the generator's arguments for them."""
    photo = PHOTO.read_bytes()
    with Client(address, shared_memory=False) as client:
        value = client.extract(model, photo, layer, extractor=EXTRACTOR)[layer]
        expected = client.extract(model, photo, layer, extractor="hook")[layer]
    assert np.abs(value - expected).max() <= 1e-4 * np.abs(expected).max(), "not the model's values"
    fields, inputs = request_fields(model, photo, layer, EXTRACTOR)
    request, answer = folder / "request", folder / "expected"
    request.write_bytes(encode_request(feature_service_pb2.ExtractRequest(**fields), inputs))
    answer.write_bytes(value.tobytes())
    return ["-request", str(request), "-expect", str(answer)]


def storm(generator: Path, address: str, callers: int, seconds: float, *more: str) -> Any:
    """Return what the generator saw."""
    command = [str(generator), "-target", address, "-callers", str(callers), *more]
    command += ["-measured", f"{seconds}s", "-warm", f"{min(3.0, seconds / 2)}s"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def faults(runs: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, float], list[str]]:
    """Return the two ratios in question, and what is wrong."""
    every = [run for each in runs.values() for run in each]
    found = [f"{run['wrong']} wrong answers" for run in every if run["wrong"]]
    ended = {code for run in every for code in run["ended"]} - {"OK", "ResourceExhausted"}
    found += [f"calls ended {code}" for code in sorted(ended)]

    def rate(callers: int) -> float:
        return statistics.median(run["answers per second"] for run in runs[str(callers)])

    def p99(callers: int) -> float:
        each = [run["ms of answered calls"].get("p99", float("inf")) for run in runs[str(callers)]]
        return statistics.median(each)

    ratios = {"rate": rate(256) / rate(8), "p99": p99(256) / p99(64)}
    if ratios["rate"] < RATE:
        found.append(f"answers per second fall to {ratios['rate']:.2f} of those of 8 callers")
    if ratios["p99"] > P99:
        found.append(f"p99 grows to {ratios['p99']:.2f} times that of 64 callers")
    return ratios, found


def main() -> int:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generator", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layer", default="avgpool")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=0, help="0: one for each caller")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("flags", nargs="*", help="more flags of `layertap serve`, after --")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {str(callers): [] for callers in CALLERS}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(options.model, options.layer, options.flags) as address,
    ):
        files = prepare(address, options.model, options.layer, Path(folder))
        for _ in range(options.rounds):
            for callers in CALLERS:
                more = [*files, "-connections", str(min(options.connections, callers))]
                run = storm(options.generator, address, callers, options.seconds, *more)
                runs[str(callers)].append(run)
                print(json.dumps(run), flush=True)
    ratios, found = faults(runs)
    results = {
        "machine": common.machine("torch", "grpcio"),
        "model": options.model,
        "layer": options.layer,
        "flags": options.flags,
        "ratios": ratios,
        "faults": found,
        "runs": runs,
    }
    common.save("storm", results, options.results)
    print(json.dumps({"ratios": ratios, "faults": found}, indent=2))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
