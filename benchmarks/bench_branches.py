"""How much faster than HOOK is a compiled plan of a transformer that looks at its attention mask?

BERT-base from its configuration, with random weights, takes token ids and masks those that are 0.
The outputs of all layers are asked for, with padding and without. The time of the compiled way
includes its guard, which finds out the outcome of each batch; see docs/extraction.md, "Branches".
Every answer is compared with a plain hook's before anything is timed. Then the ways take turns.

Needs transformers, which layertap does not: run it with a Python that has both.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import common
from layertap.extraction import PlanBuilder, Taps, measure
from layertap.extraction.base import BuiltExtractor
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import PassGuard
from layertap.extraction.points import CapturePoint
from layertap.extraction.trial import tried
from layertap.extraction.verify import compiled_tolerance, difference
from layertap.models import Batch, IdRange, ModelSpec, load_model
from layertap.selection import Capture, Extractor

TOKENS = 128
MODULE = "bench_branches_net"
COMPILED = "TORCHSCRIPT with its guard"


class Masked(nn.Module):
    """BERT on token ids, of which 0 is padding."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        self.model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the last layer's states, ``[B, tokens, 768]``."""
        mask = (ids != 0).long()
        states: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states


def batches(rows: int) -> dict[str, torch.Tensor]:
    """Return one item without padding and one with a third of it."""
    full = torch.randint(1, rows, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    padded = full.clone()
    padded[:, TOKENS * 2 // 3 :] = 0
    return {"without padding": full, "with padding": padded}


def clones(built: BuiltExtractor, x: Batch) -> list[torch.Tensor]:
    """Run an extractor and keep a clone of each value."""
    kept: list[torch.Tensor] = []
    built.run(x, lambda _, value: kept.append(value.clone()))
    return kept


def expected(net: nn.Module, names: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
    """Return what plain hooks see, in the order of the names."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = (output if isinstance(output, torch.Tensor) else output[0]).clone()

        return hook

    handles = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    net(ids)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


def compared(
    net: nn.Module, builder: PlanBuilder, spec: PassSpec, x: Batch, turns: int
) -> dict[str, Any]:
    """Build both ways for a batch, check them, and time them in turns."""
    hook = builder.build(Extractor.HOOK, spec, x.key)
    outcome = builder.outcomes.observe(spec, x)
    plan = builder.build(Extractor.TORCHSCRIPT, spec, x.key, outcome, example=x)
    guard = builder.outcomes.guard(spec, x.key, x.size)
    if guard is None:
        raise SystemExit("there is no guard")

    def compiled() -> list[torch.Tensor]:
        if guard.outcome(x) != outcome:
            raise SystemExit("the guard finds another outcome")
        return clones(plan.built, x)

    ways = {"HOOK": lambda: clones(hook.built, x), COMPILED: compiled}
    truth = expected(net, [point.path for point in spec.points], x.only)
    for way, call in ways.items():
        for value, right in zip(call(), truth, strict=True):
            if difference(value, right) > compiled_tolerance(right):
                raise SystemExit(f"{way} gives a wrong value")
    times: dict[str, list[float]] = {way: [] for way in ways}
    guards: list[float] = []
    for _ in range(turns):
        for way, call in ways.items():
            times[way] += common.timed(call, 1)
        guards += common.timed(lambda: guard.outcome(x), 1)
    found = {way: common.quantiles(each) for way, each in times.items()}
    return {
        "outcome": list(outcome),
        "ways": found,
        "guard": common.quantiles(guards),
        "speed-up, p50": found["HOOK"]["p50"] / found[COMPILED]["p50"],
    }


def run(layers: int, turns: int) -> dict[str, Any]:
    """Compare the ways for a batch without padding and one with."""
    net = Masked(layers).eval()
    module = types.ModuleType(MODULE)
    module.build = lambda: net  # type: ignore[attr-defined]
    sys.modules[MODULE] = module
    loaded = load_model(ModelSpec(f"{MODULE}:build", item_shape=(TOKENS,)))
    model = tried(loaded, PassGuard(loaded.module))
    catalogue = measure(model)
    builder = PlanBuilder(model, Taps(model.module), catalogue)
    outputs: dict[str, CapturePoint] = {}
    for point in catalogue.specs:
        if point.capture is Capture.OUTPUT:
            outputs.setdefault(point.path, point)
    spec = PassSpec(tuple(outputs[f"model.encoder.layer.{index}"] for index in range(layers)))
    main = model.signature.main
    rows = main.values.rows if isinstance(main.values, IdRange) else 2
    return {
        "machine": common.machine("torch", "transformers"),
        "threads": torch.get_num_threads(),
        "layers": layers,
        "tokens": TOKENS,
        "turns": turns,
        "batches": {
            title: compared(model.module, builder, spec, Batch({main.name: ids}), turns)
            for title, ids in batches(rows).items()
        },
    }


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    with torch.inference_mode():
        results = run(options.layers, options.turns)
    common.save("branches", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
