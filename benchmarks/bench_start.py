"""How long does a restarted server take to READY, beside plain PyTorch that loads the same model?

Processes start in turns: one that only imports torch; one that imports torch and torchvision,
builds resnet50, loads its weights and runs it once under hooks on three layers; and ``layertap
serve`` with the same weights and layers, declared, and the plan cache of an earlier start. It is
ready when it says that it serves: then the layers' values were compared, and their programs are
warm. Its first answer is compared with the hooks' values. The weights are random, from a file.

    python benchmarks/bench_start.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import common

NET, LAYERS = "resnet50", ("layer2", "layer4", "avgpool")
IMPORT, PLAIN, SERVER = "import torch", "plain PyTorch", "layertap serve"

PLAIN_SOURCE = """
import sys
import numpy, torch, torchvision
weights, given, written, *layers = sys.argv[1:]
torch.set_grad_enabled(False)
net = torchvision.models.resnet50().eval()
net.load_state_dict(torch.load(weights, weights_only=True))
kept = {}
for name in layers:
    def keep(module, args, output, name=name):
        kept[name] = output.clone()
    net.get_submodule(name).register_forward_hook(keep)
net(torch.from_numpy(numpy.load(given)))
numpy.savez(written, **{name: value.numpy() for name, value in kept.items()})
"""

MAKE_WEIGHTS = """
import sys, torch, torchvision
torch.manual_seed(0)
torch.save(torchvision.models.resnet50().state_dict(), sys.argv[1])
"""


def run(*command: str | Path) -> None:
    """Run Python with a command line, and wait for its end."""
    subprocess.run(
        [sys.executable, *command], check=True, env=common.environment(), capture_output=True
    )


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Start a server with a plan cache, and yield its address once it is ready."""
    command = [
        *(sys.executable, "-m", "layertap", "serve", NET),
        *("--weights", str(folder / "weights.pth"), "--device", "cpu", "--port", "0"),
        *("--layers", ",".join(LAYERS), "--metrics-port", "-1"),
        *("--plan-cache", str(folder / "cache")),
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=common.environment()
    ) as process:
        try:
            said = []
            for line in process.stderr or ():
                said.append(line)
                if "serving" in line:
                    yield line.split()[-1]
                    return
            raise SystemExit("the server did not start: " + "".join(said))
        finally:
            process.terminate()


def check(address: str, folder: Path) -> None:
    """Compare a server's answer with the values that plain PyTorch wrote."""
    from layertap import Client

    with Client(address) as client, np.load(folder / "values.npz") as truth:
        reply = client.extract(NET, np.load(folder / "x.npy"), list(LAYERS))
        for name in LAYERS:
            error = np.abs(reply[name] - truth[name]).max() / np.abs(truth[name]).max()
            if error > 1e-4:
                raise SystemExit(f"{name} is wrong by {error:.1e} of its largest value")


def ways(folder: Path) -> dict[str, Callable[[], float]]:
    """Return what is timed: each starts a process and returns the seconds."""

    def timed(*command: str | Path) -> float:
        begun = time.perf_counter()
        run(*command)
        return time.perf_counter() - begun

    def server() -> float:
        begun = time.perf_counter()
        with serving(folder) as address:
            took = time.perf_counter() - begun
            check(address, folder)
        return took

    files = [folder / name for name in ("weights.pth", "x.npy", "values.npz")]
    return {
        IMPORT: lambda: timed("-c", "import torch"),
        PLAIN: lambda: timed("-c", PLAIN_SOURCE, *files, *LAYERS),
        SERVER: server,
    }


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Run all ways in turns, and return their quartiles in seconds."""
    run("-c", MAKE_WEIGHTS, folder / "weights.pth")
    x = np.random.default_rng(1).random((1, 3, 224, 224), dtype=np.float32)
    np.save(folder / "x.npy", x)
    all_ways = ways(folder)
    times: dict[str, list[float]] = {name: [] for name in all_ways}
    for each in all_ways.values():
        each()  # The first start compiles Python's modules, and fills the plan cache.
    for turn in range(rounds):
        for name, each in all_ways.items():
            times[name].append(each())
        print(turn, {name: round(took[-1], 2) for name, took in times.items()}, flush=True)
    ratios = [server / plain for server, plain in zip(times[SERVER], times[PLAIN], strict=True)]
    return {
        "seconds": {name: common.quantiles(took) for name, took in times.items()},
        "times_as_long_as_plain": common.quantiles(ratios),
    }


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.rounds)
    results = {
        "machine": common.machine("torch", "torchvision"),
        "layers": LAYERS,
        "rounds": options.rounds,
        **measured,
    }
    import report

    common.save("start", results)
    report.write()


if __name__ == "__main__":
    main()
