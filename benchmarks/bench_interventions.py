"""What do 64 ablations cost beside one forward pass, and beside a loop of 64 passes?

resnet50 on one image: each of 64 channels of a block is set to zero in turn, and the scores are
taken. layertap does that in one request with 64 sets of interventions. By hand it is a loop of
whole passes with a hook. All ways run in turns in one process, and their results are compared
before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import common
import layertap
import report
from layertap import Intervention, LocalModel

NET = "resnet50"
CHANNELS = 64

PASS, VALUE = "forward pass", "the scores, without interventions"
LAYERS = ("layer4", "layer3", "layer1")


def by_hand(module: torch.nn.Module, x: torch.Tensor, layer: str) -> torch.Tensor:
    """Return the scores of each ablation, by a pass with a hook for each."""
    rows = []
    for channel in range(CHANNELS):

        def ablate(
            _module: object, _args: object, value: torch.Tensor, channel: int = channel
        ) -> torch.Tensor:
            value = value.clone()
            value[:, channel] = 0
            return value

        handle = module.get_submodule(layer).register_forward_hook(ablate)
        try:
            with torch.inference_mode():
                rows.append(module(x))
        finally:
            handle.remove()
    return torch.cat(rows)


def ways(model: LocalModel, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what to time, after the results were compared."""
    module = model.host.model.module

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return module(x)

    calls: dict[str, Callable[[], torch.Tensor]] = {
        PASS: forward,
        VALUE: lambda: model.extract(x, ["fc"], extractor="hook")["fc"],
    }
    for layer in LAYERS:
        sets = [[Intervention.zero(layer, channel=channel)] for channel in range(CHANNELS)]
        calls[swept(layer)] = lambda sets=sets: model.extract(x, ["fc"], interventions=sets)["fc"]
        calls[looped(layer)] = lambda layer=layer: by_hand(module, x, layer)
        found, expected = calls[swept(layer)](), calls[looped(layer)]()
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error <= 1e-4, (layer, error)
        # The ablations differ from one another, so their order was compared too.
        assert len(torch.unique(expected, dim=0)) > CHANNELS // 2
    return calls


def swept(layer: str) -> str:
    """Return what the table calls the ablations of a layer in one request."""
    return f"{CHANNELS} ablations of {layer}"


def looped(layer: str) -> str:
    """Return what the table calls the same ablations by hand."""
    return f"{swept(layer)}, by hand"


def run(rounds: int) -> dict[str, Any]:
    """Run all ways in turns: single passes five times in each round, what takes long once."""
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    with layertap.load(
        NET, weights="random", device="cpu", threads=threads, plan_cache="off"
    ) as model:
        calls = ways(model, x)
        timed = common.in_turns(calls, rounds, slow=calls.keys() - {PASS, VALUE})
    ratios = {layer: timed[swept(layer)]["p50"] / timed[PASS]["p50"] for layer in LAYERS}
    return {"threads": threads, "ratios": ratios, "ways": timed}


def main() -> None:
    """Run the benchmark, and write its results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = run(options.rounds)
    for way, row in results["ways"].items():
        print(f"{way:36} {row['p25']:9.1f} {row['p50']:9.1f} {row['p75']:9.1f} ms")
    common.save("interventions", {"machine": common.machine("torch", "torchvision"), **results})
    report.write()


if __name__ == "__main__":
    main()
