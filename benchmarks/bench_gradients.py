"""What does a class activation map cost beside a forward pass, and a sweep beside a loop?

resnet50, by HOOK, on one image. Grad-CAM of the last block is compared with a plain forward pass
of the same module; integrated gradients of the input with 50 steps, on a smaller image, with a loop
over batches of the same size, written by hand in PyTorch. All ways run in turns in one process, and
their results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import common
import layertap
import report
from layertap import Capture, LayerSelection, LocalModel, Method, Sweep

NET, LAYER = "resnet50", "layer4"
STEPS = 50
SWEPT_SIDE = 112
CLASS = 281

PASS, CAM, BY_HAND_CAM = "forward pass", "Grad-CAM", "Grad-CAM by hand"
LOOP, SWEEP = "integrated gradients by hand", "integrated gradients"
VALUE = "the layer's value"


def by_hand_cam(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return Grad-CAM by a hook in plain PyTorch; the layer's own memory is never overwritten."""
    kept: list[torch.Tensor] = []

    def keep(_: object, args: object, value: torch.Tensor) -> torch.Tensor:
        kept.append(value.detach().clone().requires_grad_(True))
        return kept[0] + 0

    handle = module.get_submodule(LAYER).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            score = module(x)[:, CLASS].sum()
            (slope,) = torch.autograd.grad(score, kept[0])
    finally:
        handle.remove()
    return (slope.mean((2, 3), keepdim=True) * kept[0].detach()).sum(1)


def by_hand_sweep(module: torch.nn.Module, x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return integrated gradients in plain PyTorch, with ``rows`` steps in each batch."""
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    at = torch.tensor((nodes + 1) / 2, dtype=torch.float32).view(-1, 1, 1, 1)
    share = torch.tensor(weights / 2, dtype=torch.float32).view(-1, 1, 1, 1)
    total = torch.zeros_like(x[0])
    for begin in range(0, STEPS, rows):
        part = (x * at[begin : begin + rows]).requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(module(part)[:, CLASS].sum(), part)
        total = total + (slope * share[begin : begin + rows]).sum(0)
    with torch.no_grad():
        # The completeness gap needs the score at both ends.
        module(torch.cat([x, torch.zeros_like(x)]))
    return total * x


def rows_of(model: LocalModel, swept: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Return the number of items in the largest pass of a sweep, and the sweep's result."""
    sizes: list[int] = []
    handle = model.host.model.module.register_forward_pre_hook(
        lambda _, args: sizes.append(len(args[0]))
    )
    try:
        found = swept()
    finally:
        handle.remove()
    return max(sizes), found


def ways(model: LocalModel, x: torch.Tensor) -> tuple[dict[str, Callable[[], torch.Tensor]], int]:
    """Return what to time, after the results were compared, and the size of a sweep's passes."""
    module, objective = model.host.model.module, f"fc[{CLASS}]"
    sweep = LayerSelection(
        "inputs.x",
        Capture.GRADIENT,
        method=Method.INTEGRATED_GRADIENTS,
        sweep=Sweep(steps=STEPS),
    )

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    def cam() -> torch.Tensor:
        return model.extract(x, f"{LAYER}:grad_cam", objective=objective)[f"{LAYER}:grad_cam"]

    small = x[:, :, :SWEPT_SIDE, :SWEPT_SIDE].contiguous()

    def swept() -> torch.Tensor:
        return model.extract(small, sweep, objective=objective)["inputs.x:integrated_gradients"]

    def value() -> torch.Tensor:
        return model.extract(x, ["fc"], extractor="hook")["fc"]

    _same(cam(), by_hand_cam(module, x))
    rows, found = rows_of(model, swept)
    _same(found, by_hand_sweep(module, small, rows))
    _same(value(), forward())
    calls = {
        PASS: forward,
        VALUE: value,
        CAM: cam,
        BY_HAND_CAM: lambda: by_hand_cam(module, x),
        SWEEP: swept,
        LOOP: lambda: by_hand_sweep(module, small, rows),
    }
    return calls, rows


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    # Some steps of a sweep fall on the other side of a ReLU's kink if sums are in another order.
    assert error <= 1e-2, error


def run(rounds: int) -> dict[str, Any]:
    """Run all ways in turns: a sweep once in each round, what is quick five times."""
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    with layertap.load(
        NET, weights="random", device="cpu", threads=threads, plan_cache="off"
    ) as model:
        calls, rows = ways(model, x)
        timed = common.in_turns(calls, rounds, slow={SWEEP, LOOP})
    return {"rows": rows, "threads": threads, "ways": timed}


def main() -> None:
    """Run the benchmark, and write its results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results = run(options.rounds)
    for way, row in results["ways"].items():
        print(f"{way:30} {row['p25']:9.1f} {row['p50']:9.1f} {row['p75']:9.1f} ms")
    common.save("gradients", {"machine": common.machine("torch", "torchvision"), **results})
    report.write()


if __name__ == "__main__":
    main()
