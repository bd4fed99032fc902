"""A model's inputs are read from its forward, its factory or the configuration, and tested."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

import severalnets
from asking import ask
from kept import kept
from layertap.engine import Engine
from layertap.errors import ModelLoadError
from layertap.extraction.trial import tried
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor
from layertap.settings import DeclaredInput
from quick import QUICK


def trial(net: str, item_shape: tuple[int, ...] | None = None, **more: object) -> LoadedModel:
    return tried(load_model(ModelSpec(f"severalnets:{net}", item_shape=item_shape, **more)))


@pytest.mark.parametrize(
    ("net", "item_shape", "pattern"),
    [
        ("masked", (6,), "input_ids [B, sequence], attention_mask [B, sequence]"),
        (
            "optional",
            (6,),
            "input_ids [B, sequence], attention_mask [B, sequence] (optional), token_type_ids [B, "
            "token_type_ids_sequence] (optional)",
        ),
        ("keyword_only", (6,), "input_ids [B, sequence], attention_mask [B, sequence]"),
        ("takes_dict", None, "features.input_ids [B, sequence], features.mask [B, sequence]"),
        ("takes_pair", None, "pair.0 [B, sequence], pair.1 [B, sequence, 3]"),
        ("rest", None, "left [B, 4], right [B, 2]"),
        ("diffusion", (3, 8, 8), "sample [B, 3, H, W], timestep [B]"),
        ("two_images", (3, 8, 8), "image1 [B, 3, H, W], image2 [B, 3, H, W]"),
        ("lengths", None, "x [B, 7, 6], lengths [B]"),
        ("adapted", None, "nodes [B, 3], edges [B, 3]"),
        ("scripted", (6,), "input_ids [B, sequence], attention_mask [B, sequence]"),
    ],
)
def test_the_inputs_are_found(net: str, item_shape: tuple[int, ...] | None, pattern: str) -> None:
    """Names, sizes, and which dimensions belong together, with which the model runs."""
    assert trial(net, item_shape).signature.pattern == pattern


@pytest.mark.parametrize(
    ("net", "item_shape", "types"),
    [
        ("masked", (6,), [torch.int64, torch.int64]),
        ("takes_pair", None, [torch.int64, torch.float32]),
        ("diffusion", (3, 8, 8), [torch.float32, torch.int64]),
        ("lengths", None, [torch.float32, torch.int64]),
    ],
)
def test_each_input_has_a_type_of_its_own(
    net: str, item_shape: tuple[int, ...] | None, types: list[torch.dtype]
) -> None:
    """Token ids, masks, steps and numbers in one model."""
    assert [each.dtype for each in trial(net, item_shape).signature.inputs] == types


def test_a_flag_that_must_be_given_is_refused() -> None:
    """The message names the argument and says what to do."""
    with pytest.raises(ModelLoadError, match="its forward needs 'training', which is not a tensor"):
        trial("needs_flag", (3,))


def test_inputs_that_can_not_be_guessed_are_refused() -> None:
    """Without the factory's declaration nothing fits; the message names the inputs and a remedy."""
    with pytest.raises(ModelLoadError, match=r"takes sample, timestep, .*fail.*declare its inputs"):
        trial("diffusion", (4, 8, 8))


def test_a_declared_optional_input_that_fails_is_refused() -> None:
    """A declaration is tested by a run with that input, too."""
    inputs = (
        DeclaredInput.parse("input_ids", "int64 [6], ids=50"),
        DeclaredInput.parse("token_type_ids", "float32 [6], optional"),
    )
    with pytest.raises(ModelLoadError, match="fails .* with its optional input 'token_type_ids'"):
        trial("optional", inputs=inputs)


def ids_and_mask() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8, 9, 1], [9, 3, 4, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


BATCHES = {
    "masked": ids_and_mask(),
    "keyword_only": ids_and_mask(),
    "scripted": ids_and_mask(),
    "optional": ids_and_mask(),
    "takes_dict": {
        "features.input_ids": ids_and_mask()["input_ids"],
        "features.mask": ids_and_mask()["attention_mask"],
    },
    "takes_pair": {"pair.0": torch.tensor([[1, 8, 3, 0, 2]]), "pair.1": torch.randn(1, 5, 3)},
    "rest": {"left": torch.randn(2, 4), "right": torch.randn(2, 2)},
    "diffusion": {"sample": torch.randn(2, 3, 10, 8), "timestep": torch.tensor([3, 999])},
    "two_images": {"image1": torch.rand(1, 3, 9, 7), "image2": torch.rand(1, 3, 9, 7)},
    "lengths": {"x": torch.randn(2, 7, 6), "lengths": torch.tensor([7, 3])},
    "adapted": {"nodes": torch.randn(2, 3), "edges": torch.randn(2, 3)},
}
SHAPES = {"masked": (6,), "keyword_only": (6,), "scripted": (6,), "optional": (6,),
          "diffusion": (3, 8, 8), "two_images": (3, 8, 8)}  # fmt: skip


def call(net: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the result of a fresh module, called as its author would call it."""
    module = getattr(severalnets, net)()
    with torch.inference_mode():
        match net:
            case "takes_dict":
                features = {
                    "input_ids": batch["features.input_ids"],
                    "mask": batch["features.mask"],
                }
                return module(features)
            case "takes_pair":
                return module((batch["pair.0"], batch["pair.1"]))
            case "rest":
                return module(batch["left"], batch["right"])
            case "adapted":
                return module(severalnets.Graph(batch["nodes"], batch["edges"]))
            case _:
                return module(**batch)


@pytest.mark.parametrize("net", BATCHES)
def test_every_extractor_that_claims_a_layer_gives_the_fresh_modules_values(net: str) -> None:
    """The model's result, by each extractor that claims it, or a clear refusal."""
    right = call(net, BATCHES[net])
    engine = Engine(plan_cache=kept())
    with closing(engine):
        engine.load(ModelSpec(f"severalnets:{net}", name="net", item_shape=SHAPES.get(net)))
        entry = engine.host("net").catalogue.entry("output")
        claimed = [each for each in entry.served_by(Capture.OUTPUT) if each in QUICK]
        assert Extractor.HOOK in claimed
        for extractor in claimed:
            features = ask(engine, "net", "output", BATCHES[net], extractor)
            got = torch.from_numpy(features["output"].copy())
            assert torch.allclose(got, right, rtol=1e-4, atol=1e-5), extractor
