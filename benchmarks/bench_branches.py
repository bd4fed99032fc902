"""How much faster than HOOK is a compiled plan of a transformer that looks at its attention mask?

BERT-base from its configuration, with random weights, takes 128 token ids and a mask, without
padding and with padding at the end. The outputs of all layers are asked for. The time of the
compiled way includes its guard, which finds out the outcome of each batch; see docs/extraction.md,
"Branches". Every answer is compared with a plain hook's before anything is timed. Then the ways
take turns in one process, and each turn's ratio is kept.

And how many layers does a compiled plan serve at all? Small models of four architectures are
measured as the server does it. A plan of all layers that TORCHSCRIPT claims runs without a mask,
with a mask of ones, and with padding on either side, and is compared with plain hooks.

Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import common
import report
from layertap.extraction import Catalogue, PlanBuilder, Taps, measure
from layertap.extraction.base import BuiltExtractor
from layertap.extraction.claims import kept_claims
from layertap.extraction.measure import measure_with_graph
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import PassScope
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.trial import tried
from layertap.extraction.verify import compiled_tolerance, difference
from layertap.models import Batch, LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor

TOKENS = 128
COMPILED = "TORCHSCRIPT with its guard"
PARTS = ["shares", "speed"]

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 37, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
SMALL_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
TOKENS_OF_BERT = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "BertModel": SMALL,
    "ModernBertModel": {**SMALL, **TOKENS_OF_BERT, "local_attention": 6},
    "T5EncoderModel": SMALL_T5,
    "T5Model": SMALL_T5,
    "LlamaModel": {**SMALL, "num_key_value_heads": 2},
}


def load(name: str, settings: Mapping[str, Any], item: tuple[int, ...] | None) -> LoadedModel:
    """Return a model of transformers with random weights, from its configuration."""
    import transformers

    config = getattr(transformers, name).config_class(architectures=[name], **settings)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = load_model(ModelSpec(f"hf-config:{folder}", item_shape=item))
    return tried(loaded, PassScope(loaded.module))


def batch(model: LoadedModel, items: int, tokens: int, mask: torch.Tensor | None) -> Batch:
    """Return a batch of random ids ``[items, tokens]``, with a mask of that shape if given."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (items, tokens), generator=generator)
    given = {spec.name: ids for spec in model.signature.required}
    if mask is not None:
        given["attention_mask"] = mask
    names = [spec.name for spec in model.signature.inputs]
    return Batch({name: given[name] for name in names if name in given})


def masks(items: int, tokens: int) -> dict[str, torch.Tensor | None]:
    """Return masks without padding and with a third of the tokens as padding."""
    right = torch.ones(items, tokens, dtype=torch.int64)
    right[:, tokens * 2 // 3 :] = 0
    return {
        "without padding": torch.ones_like(right),
        "padding at the end": right,
        "padding at the beginning": right.flip(-1),
    }


def clones(built: BuiltExtractor, x: Batch) -> list[torch.Tensor]:
    """Run an extractor and keep a clone of each value."""
    kept: list[torch.Tensor] = []
    built.run(x, lambda _, value: kept.append(value.clone()))
    return kept


def expected(net: nn.Module, names: list[str], x: Batch) -> list[torch.Tensor]:
    """Return what plain hooks see at each module's first call, in the order of the names."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output if isinstance(output, torch.Tensor) else output[0]
            seen.setdefault(name, value.clone())

        return hook

    handles = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    net(**x)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


def wrong(values: list[torch.Tensor], truth: list[torch.Tensor]) -> int:
    """Return how many values differ from plain hooks by more than the tolerance."""
    return sum(
        difference(value, right) > compiled_tolerance(right)
        for value, right in zip(values, truth, strict=True)
    )


def compared(builder: PlanBuilder, model: LoadedModel, names: list[str], x: Batch,
             turns: int) -> dict[str, Any]:  # fmt: skip
    """Build both ways for a batch, check them, and time them in turns."""
    spec = PassSpec(tuple(CapturePoint(PointKind.MODULE, name) for name in names))
    hook = builder.build(Extractor.HOOK, spec, x.key)
    outcome = builder.outcomes.observe(spec, x)
    plan = builder.build(Extractor.TORCHSCRIPT, spec, x.key, outcome, example=x)
    builder.prover.warm(plan, x.size)
    guard = builder.outcomes.guard(spec, x.key, x.size)

    def compiled() -> list[torch.Tensor]:
        if guard is not None and guard.outcome(x) != outcome:
            raise SystemExit("the guard finds another outcome")
        return clones(plan.built, x)

    ways = {"HOOK": lambda: clones(hook.built, x), COMPILED: compiled}
    truth = expected(model.module, names, x)
    for way, call in ways.items():
        if wrong(call(), truth):
            raise SystemExit(f"{way} gives a wrong value")
    times: dict[str, list[float]] = {way: [] for way in ways}
    guards: list[float] = []
    for _ in range(turns):
        for way, call in ways.items():
            times[way] += common.timed(call, 1)
        guards += common.timed(lambda: guard and guard.outcome(x), 1)
    found = {way: common.quantiles(each) for way, each in times.items()}
    return {
        "outcome": list(outcome),
        "largest error": max(map(difference, compiled(), truth)),
        "ways": found,
        "guard": common.quantiles(guards),
        "speed-up, p50": found["HOOK"]["p50"] / found[COMPILED]["p50"],
        "speed-up, by turn": common.quantiles(
            [hooked / quick for hooked, quick in zip(times["HOOK"], times[COMPILED], strict=True)]
        ),
    }


def speed(layers: int, turns: int) -> dict[str, Any]:
    """Compare the ways for BERT-base, for a batch without padding and for one with it."""
    model = load("BertModel", {"num_hidden_layers": layers}, (TOKENS,))
    catalogue = measure(model)
    builder = PlanBuilder(model, Taps(model.module), catalogue)
    names = [f"encoder.layer.{index}" for index in range(layers)]
    return {
        title: compared(builder, model, names, batch(model, 1, TOKENS, mask), turns)
        for title, mask in masks(1, TOKENS).items()
        if title != "padding at the beginning"
    }


def measured(model: LoadedModel) -> Catalogue:
    """Return a model's catalogue, with the claims that hold."""
    *_, kept = kept_claims(model, *measure_with_graph(model))
    assert kept is not None
    return kept


def served(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many layers a compiled plan serves, and compare their values."""
    model = load(name, settings, None)
    catalogue = measured(model)
    hooked = [each for each in catalogue if each.serves(Extractor.HOOK, Capture.OUTPUT)]
    mine = [each for each in hooked if each.serves(Extractor.TORCHSCRIPT, Capture.OUTPUT)]
    paths = {path for path, _ in model.module.named_modules() if path}
    names = [each.name for each in mine if each.name in paths]
    spec = PassSpec(tuple(CapturePoint(PointKind.MODULE, name) for name in names))
    builder = PlanBuilder(model, Taps(model.module), catalogue)
    tokens, compared_values, mistakes = 12, 0, 0
    for items in (1, 2):
        for mask in (None, *masks(items, tokens).values()):
            x = batch(model, items, tokens, mask)
            outcome = builder.outcomes.observe(spec, x)
            plan = builder.build(Extractor.TORCHSCRIPT, spec, x.key, outcome, example=x)
            values = clones(plan.built, x)
            compared_values += len(values)
            mistakes += wrong(values, expected(model.module, names, x))
    return {
        "layers of HOOK": len(hooked),
        "of TORCHSCRIPT": len(mine),
        "share": len(mine) / len(hooked),
        "values compared": compared_values,
        "wrong": mistakes,
    }


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="what to run; the results of the other part are kept")  # fmt: skip
    options = parser.parse_args()
    results = common.load("branches") or {}
    with torch.inference_mode():
        if "shares" in options.parts:
            results["architectures"] = {name: served(name, x) for name, x in ARCHITECTURES.items()}
        if "speed" in options.parts:
            results |= {
                "machine": common.machine("torch", "transformers"),
                "threads": torch.get_num_threads(),
                "layers": options.layers,
                "tokens": TOKENS,
                "turns": options.turns,
                "batches": speed(options.layers, options.turns),
            }
    common.save("branches", results)
    if {"architectures", "batches"} <= results.keys():
        report.write()
    else:
        print("the page is written when both parts have been run")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
