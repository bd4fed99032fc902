"""Language models of transformers whose mask is optional are served by compiled plans."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hfnets
from asking import ask
from kept import kept
from layertap import Extractor
from layertap.engine import Engine, Limits
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from layertap.selection import Capture

HEADS = {**hfnets.TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaModel": HEADS,
    "GPT2Model": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40,
                  "bos_token_id": 1, "eos_token_id": 2},
    "MambaModel": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "BertModel": hfnets.TEXT,
    # Its second layer attends locally. T5's takes the positions' biases of its first.
    "ModernBertModel": {**hfnets.TEXT, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
                        "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
                        "local_attention": 6},
    "T5EncoderModel": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2,
                       "num_heads": 4},
}  # fmt: skip
QUICK = ("BertModel",)
"""Those that are tried in each run."""

PATIENCE = 60
"""Seconds to wait for a plan."""

FEWEST = 0.9
"""The share of layers, of those that HOOK serves, that a compiled plan must serve."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(Limits(), threads=1, plan_cache=kept())
    yield engine
    engine.close()


def given(seed: int, *lengths: int, tokens: int = 8, left: bool = False) -> dict[str, torch.Tensor]:
    """Return ids and a mask: one item for each length, the rest is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (len(lengths), tokens), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        row[(slice(tokens - length, None) if left else slice(length))] = 1
    return {"input_ids": ids, "attention_mask": mask}


def without_mask(seed: int, items: int, tokens: int = 8) -> dict[str, torch.Tensor]:
    return {"input_ids": given(seed, *[tokens] * items, tokens=tokens)["input_ids"]}


BATCHES = [
    without_mask(0, 1), without_mask(1, 3), given(2, 8), given(3, 8, 8, 8), given(4, 8, 3),
    given(5, 5, 2, left=True), given(6, 7, 11, tokens=11),
]  # fmt: skip


def truth(net: nn.Module, names: list[str], x: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of modules of a fresh model, seen by plain hooks."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(name, output.clone())

        return hook

    # As layertap does. With a cache, Llama does not test whether positions begin again.
    net.config.use_cache = False  # type: ignore[union-attr]
    for name in names:
        net.get_submodule(name).register_forward_hook(keep(name))
    with torch.inference_mode():
        net(**x)
    return [seen[name] for name in names]


def compiled_modules(engine: Engine, net: nn.Module) -> list[str]:
    """Return the modules whose output a compiled plan serves: nearly all."""
    paths = {path for path, _ in net.named_modules() if path}
    hooked = [e for e in engine.host("net").catalogue if e.serves(Extractor.HOOK, Capture.OUTPUT)]
    refused = {entry.name: entry.refusal(Extractor.TORCHSCRIPT) for entry in hooked}
    served = [name for name, reason in refused.items() if not reason]
    assert len(served) >= FEWEST * len(hooked), refused
    return [name for name in served if name in paths]


@pytest.mark.parametrize(
    "name",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.long) for each in MODELS],
)
def test_a_compiled_plan_gives_the_models_values_with_a_mask_and_without(
    engine, tmp_path: Path, name: str
) -> None:
    """All modules have the fresh model's values for each mask, batch size and length."""
    engine.load(ModelSpec(f"hf:{hfnets.saved(tmp_path / 'net', name, **MODELS[name])}"))
    names = compiled_modules(engine, hfnets.built(name, **MODELS[name]))
    for x in BATCHES:
        expected = truth(hfnets.built(name, **MODELS[name]), names, x)
        features = ask(engine, "net", names, x, Extractor.TORCHSCRIPT)
        assert features.extractor is Extractor.TORCHSCRIPT
        for each, right in zip(names, expected, strict=True):
            error = difference(features.torch()[each], right)
            assert error <= COMPILED_TOLERANCE[torch.float32], (each, list(x), error)


PACKED = {
    "input_ids": given(7, 8, 8)["input_ids"],
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4]]),
}
IN_ORDER = {**PACKED, "position_ids": torch.arange(8).expand(2, -1).clone()}


def test_auto_changes_to_a_compiled_plan_for_each_set_of_inputs(engine, tmp_path: Path) -> None:
    """HOOK answers until a plan of these inputs and their outcome is compiled; both are right."""
    engine.load(ModelSpec(f"hf:{hfnets.saved(tmp_path / 'net', 'LlamaModel', **HEADS)}"))
    layer = "layers.0"
    batches = [without_mask(0, 2), given(1, 8, 8), given(2, 8, 3), IN_ORDER, PACKED]
    for x in batches:
        (expected,) = truth(hfnets.built("LlamaModel", **HEADS), [layer], x)
        extractors = []
        ends = time.monotonic() + PATIENCE
        while extractors[-1:] != [Extractor.TORCHSCRIPT] and time.monotonic() < ends:
            features = ask(engine, "net", layer, x)
            assert difference(features.torch()[layer], expected) <= 1e-4
            extractors.append(features.extractor)
        assert extractors[0] is Extractor.HOOK
        assert extractors[-1] is Extractor.TORCHSCRIPT
    for x in batches:
        assert ask(engine, "net", layer, x).extractor is Extractor.TORCHSCRIPT
