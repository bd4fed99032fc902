"""What do a TorchScript program's first runs cost, with torch's profiling executor and without it?

By default torch records the types of a program's tensors in its first run and optimises for them in
the second. layertap turns that off on the CPU (Note [Programs run without profiling] in
``extraction/kinds/torchscript.py``). Here every model is traced, frozen and optimised as layertap
does it, and a fresh copy of the program is run both ways: its first three runs, in turns over
several copies, and then further runs of both in turns. All outputs of first runs must be equal bit
by bit.

    python benchmarks/bench_first_runs.py
"""

from __future__ import annotations

import argparse
import io
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torchvision
from torch import nn

import common
import report

VISION = (
    "resnet50",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
    "vit_b_16",
    "swin_t",
)
FIRST = 3
PROFILED, PLAIN = "profiled", "not profiled"


class Encoder(nn.Module):
    """A BERT of transformers with random weights, which takes token ids only."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.net = BertModel(BertConfig(num_hidden_layers=6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state."""
        state: torch.Tensor = self.net(ids, torch.ones_like(ids)).last_hidden_state
        return state


def subjects() -> dict[str, tuple[Callable[[], nn.Module], torch.Tensor]]:
    """Return how to build each model, and its input."""
    random = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 224, 224, generator=random)
    found: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
        name: (lambda name=name: torchvision.models.get_model(name), image) for name in VISION
    }
    found["BERT, 6 layers, 64 tokens"] = (
        Encoder,
        torch.randint(1, 30000, (1, 64), generator=random),
    )
    return found


def stored(module: nn.Module, x: torch.Tensor) -> bytes:
    """Return the traced and frozen program as a file."""
    traced = torch.jit.trace(module.eval(), x, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.freeze(traced.eval()), buffer)
    return buffer.getvalue()


def fresh(file: bytes) -> Any:
    """Return a program that has not run yet, optimised as layertap's."""
    return torch.jit.optimize_for_inference(torch.jit.load(io.BytesIO(file)))


def executor(way: str) -> AbstractContextManager[Any]:
    """Return the block in which a program runs that way."""
    off: AbstractContextManager[Any] = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    return nullcontext() if way == PROFILED else off


def measure(file: bytes, x: torch.Tensor, copies: int, rounds: int) -> dict[str, Any]:
    """Return the times of the first runs and of later ones, in milliseconds, for both ways."""
    # What a process does once must not count for the way that is first.
    warm = fresh(file)
    truth: torch.Tensor = [warm(x) for _ in range(FIRST)][-1]
    firsts: dict[str, list[list[float]]] = {PROFILED: [], PLAIN: []}
    programs = {}
    for copy in range(copies):
        for way in (PROFILED, PLAIN) if copy % 2 else (PLAIN, PROFILED):
            program = programs[way] = fresh(file)
            values = []
            with executor(way):
                times = common.timed(lambda: values.append(program(x)), FIRST)  # noqa: B023
            if not all(torch.equal(value, truth) for value in values):
                raise SystemExit(f"{way}: another value")
            firsts[way].append(times)
    later: dict[str, list[float]] = {PROFILED: [], PLAIN: []}
    for _ in range(rounds):
        for way, program in programs.items():
            with executor(way):
                later[way] += common.timed(lambda: program(x), 1)  # noqa: B023
    return {
        way: {
            "first_ms": [
                statistics.median(times[run] for times in firsts[way]) for run in range(FIRST)
            ],
            "later_ms": common.quantiles(later[way]),
        }
        for way in (PROFILED, PLAIN)
    }


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = {}
    with torch.inference_mode():
        for name, (build, x) in subjects().items():
            torch.manual_seed(0)
            rows[name] = measure(stored(build(), x), x, options.copies, options.rounds)
            print(name, rows[name], flush=True)
    results = {
        "machine": common.machine("torch", "torchvision"),
        "fuses_on_cpu": torch._C._jit_can_fuse_on_cpu(),
        "copies": options.copies,
        "rounds": options.rounds,
        "models": rows,
    }
    common.save("first_runs", results)
    report.write()


if __name__ == "__main__":
    main()
