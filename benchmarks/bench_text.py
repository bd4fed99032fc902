"""What does the server add to a pass of BERT-base, for large replies and for small ones?

BERT-base from its configuration, with random weights, is served from a process of its own. A client
on the same machine asks for the states of all 12 layers at 512 tokens, 18.9 MB through shared
memory, and for the last token of one layer. Another process runs the same passes in plain PyTorch,
cut after the last layer that is asked for, with as many threads. A tiny model shows the floor: what
any request to the server takes. All of them take turns, and each turn's ratio is kept, so that a
machine whose speed drifts slows all alike. Every value is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import common
import report
from layertap import Client, Features, LayerSelection, keep_memory
from layertap.selection import Reduction

TOKENS = 512
ALL = "all layers"
LAST = "last token of one layer"
LAYERS = 12
ONE = 5
"""The layer whose last token is asked for."""

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 64}  # fmt: skip
FLOOR = "floor of the server"
HOOK, COMPILED = "hook", "torchscript"
EXTRACTORS = (HOOK, "auto")
PATIENCE = 180
"""Seconds to wait until AUTO has a compiled plan."""
TOLERANCE = 1e-4

Times = dict[str, list[list[float]]]
"""Milliseconds of each way: the calls of each turn."""


def ids() -> np.ndarray:
    """Return the token ids ``[1, TOKENS]`` of both sides; none of them is padding."""
    return np.random.default_rng(0).integers(1000, 30000, (1, TOKENS))


class Passes:
    """A child process that runs the passes in plain PyTorch."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--child", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def save(self, case: str, file: Path) -> np.ndarray:
        """Return what a pass gives: ``[layers, TOKENS, 768]``, or ``[768]`` of the last token."""
        self._ask(case=case, file=str(file))
        loaded: np.ndarray = np.load(file)
        return loaded

    def times(self, case: str, calls: int) -> list[float]:
        """Return the milliseconds of each of some passes."""
        return list(self._ask(case=case, calls=calls))

    def threads(self) -> int:
        """Return the number of threads that an operation uses."""
        return int(self._ask(case="threads"))

    def close(self) -> None:
        """End the child."""
        self._process.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def serve_passes(folder: Path) -> None:
    """Be that child: answer one JSON object a line."""
    import torch

    from layertap.models import ModelSpec, load_model

    keep_memory()
    # The bare module of transformers, with the server's random weights.
    model: Any = load_model(ModelSpec(f"hf-config:{folder}")).module
    model.pooler = None
    x = torch.from_numpy(ids())

    def run(case: str) -> Any:
        """Return clones of what is asked for, after a pass that ends at the last layer of it."""
        layers = LAYERS if case == ALL else ONE + 1
        kept: list[torch.Tensor] = []
        whole, model.encoder.layer = model.encoder.layer, model.encoder.layer[:layers]
        hooks = [
            layer.register_forward_hook(
                lambda _, args, y: kept.append((y if case == ALL else y[:, -1]).clone())
            )
            for layer in (model.encoder.layer if case == ALL else model.encoder.layer[-1:])
        ]
        try:
            model(input_ids=x)
        finally:
            model.encoder.layer = whole
            for hook in hooks:
                hook.remove()
        return torch.cat(kept).squeeze()

    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answer: Any = None
            if request["case"] == "threads":
                answer = torch.get_num_threads()
            elif "file" in request:
                np.save(request["file"], run(request["case"]).numpy())
            else:
                answer = common.timed(lambda case=request["case"]: run(case), request["calls"])
            print(json.dumps(answer), flush=True)


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """Serve a folder's model with random weights; yield the address once it is ready."""
    command = [sys.executable, "-m", "layertap", "serve", f"hf-config:{folder}", "--port", "0"]
    command += ["--metrics-port", "-1", "--plan-cache", "off", "--mode", "latency", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield next(line for line in process.stderr if "serving" in line).split()[-1]
        finally:
            process.terminate()


def configuration(folder: Path, name: str, **settings: Any) -> Path:
    """Write the configuration of a BERT into a folder of that name."""
    import transformers

    (folder / name).mkdir()
    config = transformers.BertConfig(architectures=["BertModel"], **settings)
    config.save_pretrained(folder / name)
    return folder / name


class Asker:
    """Asks a server for the layers of a case.

    Args:
        client: The client.
        case: ALL or LAST.
    """

    def __init__(self, client: Client, case: str) -> None:
        self._client = client
        self._x = ids()
        self._layers = (
            [f"encoder.layer.{index}" for index in range(LAYERS)]
            if case == ALL
            else [LayerSelection(f"encoder.layer.{ONE}", reduction=Reduction.LAST_TOKEN)]
        )

    def ask(self, extractor: str) -> Features:
        """Return the reply."""
        return self._client.extract("base", self._x, self._layers, extractor=extractor)

    def check(self, extractor: str, expected: np.ndarray) -> None:
        """Stop where a reply is not what plain PyTorch gives; wait for AUTO's compiled plan."""
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            features = self.ask(extractor)
            value = np.concatenate(list(features.values())).squeeze()
            error = float(np.abs(value - expected).max() / np.abs(expected).max())
            if not error <= TOLERANCE:
                raise SystemExit(f"{extractor} differs from plain PyTorch by {error:.1e}")
            if features.extractor in {extractor, COMPILED}:
                return
        raise SystemExit(f"{extractor} still answers by {features.extractor}")


def run(rounds: int, calls: int) -> dict[str, Any]:
    """Time all ways in turns."""
    times: Times = {}
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        base, tiny = configuration(folder, "base"), configuration(folder, "tiny", **TINY)
        passes = Passes(base)
        closing.callback(passes.close)
        large = closing.enter_context(serving(base))
        small = closing.enter_context(serving(tiny))
        client = closing.enter_context(Client(large, timeout=600))
        other = closing.enter_context(Client(small))
        one = np.ones((1, 4), np.int64)
        ways: dict[str, Callable[[], list[float]]] = {}
        for case in (ALL, LAST):
            asker, expected = Asker(client, case), passes.save(case, folder / "expected.npy")
            ways[f"{case}, pass"] = partial(passes.times, case, calls)
            for extractor in EXTRACTORS:
                asker.check(extractor, expected)
                ways[f"{case}, {extractor}"] = partial(
                    common.timed, partial(asker.ask, extractor), calls
                )
        smallest = partial(other.extract, "tiny", one, "embeddings.word_embeddings", extractor=HOOK)
        ways[FLOOR] = partial(common.timed, smallest, 20)
        for round_ in range(rounds + 1):
            for name, way in ways.items():
                got = way()[1:]  # The first call wakes up whatever slept meanwhile.
                if round_:
                    times.setdefault(name, []).append(got)
        threads = passes.threads()
    return {
        "machine": common.machine("torch", "transformers", "grpcio"),
        "threads": threads,
        "tokens": TOKENS,
        "rounds": rounds,
        "milliseconds": {
            name: common.quantiles([each for got in turns for each in got])
            for name, turns in times.items()
        },
        "ratios": ratios(times),
        "last token, over the pass and the floor": overheads(times),
    }


def ratios(times: Times) -> dict[str, Any]:
    """Return how long a request takes as a multiple of the pass: of the medians, and by turn."""
    found = {}
    for extractor in EXTRACTORS:
        passes, asked = times[f"{ALL}, pass"], times[f"{ALL}, {extractor}"]
        turns = [
            statistics.median(mine) / statistics.median(bare)
            for mine, bare in zip(asked, passes, strict=True)
        ]
        found[extractor] = {"p50": median(asked) / median(passes), "turns": common.quantiles(turns)}
    return found


def overheads(times: Times) -> dict[str, float]:
    """Return the milliseconds that the last token takes beyond the pass and the floor, at p50."""
    expected = median(times[f"{LAST}, pass"]) + median(times[FLOOR])
    return {extractor: median(times[f"{LAST}, {extractor}"]) - expected for extractor in EXTRACTORS}


def median(turns: list[list[float]]) -> float:
    """Return the median of all times."""
    return statistics.median(each for got in turns for each in got)


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve_passes(options.child)
        return
    keep_memory()
    results = run(options.rounds, options.calls)
    common.save("text", results)
    report.write()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
