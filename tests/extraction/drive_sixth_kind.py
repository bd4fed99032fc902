"""Serve tiny nets with a package that has TORCH_EXPORT, and print the results as JSON.

A script of test_sixth_kind.py, which runs it on a copy of the package. The argument is an empty
folder, for compiled plans.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from layertap.extraction.kinds.torch_export import TorchExportKind

import tinynets
from asking import ask
from layertap import Extractor
from layertap.cli.render import LETTERS
from layertap.engine import Engine, describe
from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.plan_cache import PlanCache
from layertap.models import ModelSpec
from layertap.selection import Capture, LayerSelection
from layertap.v1 import catalogue_pb2
from layertap.wire.descriptions import description_to_proto
from oracle import outputs_of
from tinynets import ITEM

X = torch.rand(5, *ITEM, generator=torch.Generator().manual_seed(0))
PATIENCE = 60


def loaded(folder: Path, net: str, *declared: str) -> Engine:
    """Return an engine that serves one net, like a process that has just started."""
    engine = Engine(plan_cache=PlanCache(folder, 1 << 30))
    engine.load(
        ModelSpec(f"tinynets:{net}", item_shape=ITEM), [LayerSelection(name) for name in declared]
    )
    return engine


def error_of(engine: Engine, net: str, layer: str) -> str:
    """Return the refusal of a request for a layer by this kind; empty if it is served."""
    try:
        ask(engine, net, layer, X, Extractor["TORCH_EXPORT"])
    except ExtractorUnsupportedError as error:
        return str(error)
    return ""


def is_right(value: torch.Tensor, net: str, layer: str) -> bool:
    """Compare a value, bit for bit, with plain PyTorch on a fresh net."""
    with torch.inference_mode():
        return torch.equal(value, outputs_of(getattr(tinynets, net)(), X, layer)[0])


def asked_for(folder: Path) -> dict[str, Any]:
    """Request layers by the kind's name, including those that it refuses."""
    engine = loaded(folder, "residual")
    try:
        features = ask(engine, "residual", ["layer1", "layer2"], X, Extractor["TORCH_EXPORT"])
        entry = engine.host("residual").catalogue.entry("layer2")
        [layer] = (
            layer
            for layer in description_to_proto(describe(engine.host("residual"))).layers
            if layer.name == "layer2"
        )
        return {
            "by": features.extractor.name,
            "right": [is_right(features.torch()[n], "residual", n) for n in ("layer1", "layer2")],
            "catalogue": [extractor.name for extractor in entry.served_by(Capture.OUTPUT)],
            "wire": {
                catalogue_pb2.Extractor.Name(support.extractor): [
                    [catalogue_pb2.Capture.Name(verdict.capture), verdict.served, verdict.reason]
                    for verdict in support.captures
                ]
                for support in layer.extractors
            },
            "letters": "".join(LETTERS.values()),
            "input": error_of(engine, "residual", "layer2:input"),
            "node": error_of(engine, "residual", "layer1.0.add"),
        }
    finally:
        engine.close()


def refused(folder: Path) -> dict[str, str]:
    """Request what the kind does not claim, or claims wrongly."""
    found = {}
    for net, layer in (("raises", "head"), ("bakes_batch", "tail")):
        engine = loaded(folder, net)
        found[net] = error_of(engine, net, layer)
        engine.close()
    return found


def promoted(folder: Path, wanted: str) -> list[str]:
    """Request a layer with AUTO until a kind serves it; return who served, each once, in order."""
    engine = loaded(folder, "chain")
    seen: list[str] = []
    ends = time.monotonic() + PATIENCE
    while wanted not in seen and time.monotonic() < ends:
        features = ask(engine, "chain", "layer1", X)
        if features.extractor.name not in seen:
            seen.append(features.extractor.name)
        if features.extractor.name == "TORCH_EXPORT":
            assert is_right(features.torch()["layer1"], "chain", "layer1")
    engine.close()
    return seen


def not_compiled(folder: Path) -> list[str]:
    """Request like ``promoted``, but the kind that AUTO prefers can't compile anything."""
    compile_one = TorchExportKind.compile

    def fails(self: TorchExportKind, *args: Any) -> Any:
        raise RuntimeError("planted")

    TorchExportKind.compile = fails  # type: ignore[method-assign] # put back below
    try:
        return promoted(folder, "TORCHSCRIPT")
    finally:
        TorchExportKind.compile = compile_one  # type: ignore[method-assign]


def stored(folder: Path) -> dict[str, Any]:
    """Declare a layer at two starts; the second finds the program of the first."""
    compiled = []
    compile_one = TorchExportKind.compile

    def counted(self: TorchExportKind, *args: Any) -> Any:
        if len(args) == 3:  # Not a trial when the model is loaded, whose programs return digests.
            compiled.append(args)
        return compile_one(self, *args)

    TorchExportKind.compile = counted  # type: ignore[method-assign] # put back with the process
    starts = []
    for _ in range(2):
        engine = loaded(folder, "chain", "layer2")
        features = ask(engine, "chain", "layer2", X)
        right = is_right(features.torch()["layer2"], "chain", "layer2")
        starts.append([features.extractor.name, right, len(compiled)])
        engine.close()
    return {"starts": starts, "files": len(list(folder.glob("*.plan.pt")))}


def main() -> None:
    """Print the results."""
    folder = Path(sys.argv[1])
    facts = {
        "asked": asked_for(folder),
        "refused": refused(folder),
        "promoted": promoted(folder, "TORCH_EXPORT"),
        "not_compiled": not_compiled(folder),
        "stored": stored(folder),
    }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
