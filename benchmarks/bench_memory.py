"""Does a server's memory level off?

Thousands of requests of every kind to one server: tensors and a photograph, one layer and many,
batches of 1 to 8, every extractor, reductions, other item shapes, and mistakes of every sort. The
server's resident memory is read every hundred requests.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import common
import report
from layertap import Client, Extractor, LayerSelection, LayertapError, Reduction

NET = "resnet18"
SIDE = 64
PHOTO = Path(__file__).resolve().parent.parent / "examples" / "images" / "grace_hopper.jpg"
LAYERS = ("conv1", "bn1", "layer1", "layer2.0", "layer3", "layer4", "avgpool", "fc")
CALLERS = 4
# A package of EXPORT takes longer to compile than this benchmark runs.
ASKED = tuple(each for each in Extractor if each is not Extractor.EXPORT)
SAMPLES = 100


class Mix:
    """A seeded sequence of requests."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._photo = PHOTO.read_bytes()

    def one(self, client: Client) -> str:
        """Send the next request; return its extractor, or the kind of its error."""
        try:
            return str(self._send(client).extractor)
        except (LayertapError, ValueError) as error:
            return type(error).__name__

    def _send(self, client: Client) -> Any:
        choose = self._random
        side = choose.choice((SIDE, SIDE, SIDE, 96))
        x: Any = np.random.default_rng(choose.randrange(4)).random(
            (choose.choice((1, 1, 2, 4, 8)), 3, side, side), dtype=np.float32
        )
        layers: list[Any] = choose.sample(LAYERS, choose.choice((1, 1, 2, 4)))
        extractor = Extractor.AUTO
        match choose.randrange(12):
            case 0:
                x = self._photo
            case 1:
                layers = ["layer1.**"]
            case 2:
                layers = [LayerSelection("layer2", reduction=Reduction.GLOBAL_AVERAGE_POOL)]
            case 3:
                extractor = choose.choice(ASKED)
            case 4:
                layers = [choose.choice(("layer9", "conv1:output:x", "layer*[", ""))]
            case 5:
                x = choose.choice((x[0], x[:, :1], x.astype(np.float64), b"no image"))
            case _:
                pass
        return client.extract(NET, x, layers, extractor=extractor)


def resident_mib(pid: int) -> float:
    """Return a process's memory in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return pages * 4096 / 2**20


def run(requests: int) -> dict[str, Any]:
    """Send the requests; return the curve and what became of them."""
    command = [sys.executable, "-m", "layertap", "serve", NET, "--weights", "random"]
    command += ["--item-shape", f"3,{SIDE},{SIDE}", "--layers", "layer1,avgpool"]
    command += ["--port", "0", "--metrics-port", "-1", "--plan-cache", "off"]
    curve: list[tuple[int, float]] = []
    outcomes: dict[str, int] = {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(line for line in process.stderr if "serving" in line).split()[-1]
            curve.append((0, resident_mib(process.pid)))
            step = max(1, requests // SAMPLES)
            mixes = [Mix(seed) for seed in range(CALLERS)]

            def some(mix: Mix) -> list[str]:
                with Client(address) as client:
                    return [mix.one(client) for _ in range(step // CALLERS)]

            with ThreadPoolExecutor(CALLERS) as pool:
                for sent in range(step, requests + 1, step):
                    for outcome in (o for outcomes in pool.map(some, mixes) for o in outcomes):
                        outcomes[outcome] = outcomes.get(outcome, 0) + 1
                    curve.append((sent, resident_mib(process.pid)))
        finally:
            process.terminate()
    return {
        "machine": common.machine("torch", "grpcio"),
        "requests": requests,
        "resident_mib": curve,
        "outcomes": dict(sorted(outcomes.items())),
    }


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    results = run(options.requests)
    common.save("memory", results)
    report.write()
    curve = results["resident_mib"]
    shown = [curve[i * (len(curve) - 1) // 10] for i in range(11)]
    print(json.dumps({"curve": shown, "outcomes": results["outcomes"]}))


if __name__ == "__main__":
    main()
