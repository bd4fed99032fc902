"""Layouts and batch dimensions are found by experiment; otherwise they stay unknown."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from layertap.errors import InvalidInputError
from layertap.extraction import Catalogue, measure
from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.reductions import reduced
from layertap.extraction.trial import tried
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Reduction
from oracle import outputs_of

SQUARE, WIDE = (3, 16, 16), (3, 16, 24)
FIRST, LAST, TOKENS = Layout.CHANNELS_FIRST, Layout.CHANNELS_LAST, Layout.TOKENS
POOL, CLASS, FLATTEN = Reduction.GLOBAL_AVERAGE_POOL, Reduction.CLASS_TOKEN, Reduction.FLATTEN


def loaded(net: str, item_shape: tuple[int, ...]) -> LoadedModel:
    source = net if ":" in net else f"layoutnets:{net}"
    return tried(load_model(ModelSpec(source, item_shape=item_shape)))


@cache
def measured(net: str, item_shape: tuple[int, ...]) -> tuple[LoadedModel, Catalogue]:
    """Return a model and its catalogue, shared by all tests: none changes them."""
    model = loaded(net, item_shape)
    return model, measure(model)


CASES = [
    ("mixer", SQUARE, "stem", Geometry(FIRST, 64, 4, 4)),
    ("mixer", SQUARE, "mlp_tokens", Geometry(positions=(2,))),
    ("mixer", SQUARE, "norm", Geometry(TOKENS, 64, 4, 4)),
    ("vit", WIDE, "stem", Geometry(FIRST, 16, 4, 6)),
    ("vit", WIDE, "embedded", Geometry(TOKENS, 16, 4, 6, front=1)),
    ("vit", WIDE, "attention.0", Geometry(TOKENS, 16, 4, 6, front=1)),
    ("vit", WIDE, "out", Geometry(TOKENS, 16, 4, 6, front=1)),
    ("queries", SQUARE, "stem", Geometry(FIRST, 8, 4, 4)),
    ("queries", SQUARE, "out", Geometry()),
    ("batch_second", SQUARE, "second", Geometry(TOKENS, 8, 4, 4)),
    ("series", (6, 32), "first", Geometry(positions=(2,))),
    ("series", (6, 32), "last", Geometry(positions=(1,))),
    ("text", (12,), "embed", Geometry(positions=(1,))),
    ("text", (12,), "out", Geometry(positions=(1,))),
    ("pools", SQUARE, "stem", Geometry(FIRST, 8, 16, 16)),
    ("pools", SQUARE, "grid", Geometry(FIRST, 8, 4, 4)),
    ("pools", SQUARE, "one", Geometry(FIRST, 8, 1, 1)),
    ("video", (3, 4, 16, 16), "stem", Geometry(FIRST, 8, 4, 4)),
    ("video", (3, 4, 16, 16), "last", Geometry(LAST, 8, 4, 4)),
    ("video", (3, 4, 16, 16), "tokens", Geometry(positions=(1,))),
    ("tinynets:patches", WIDE, "tokens", Geometry(TOKENS, 6, 4, 6, front=3)),
    ("tinynets:patches", WIDE, "bare", Geometry(TOKENS, 6, 4, 6)),
    ("tinynets:patches", WIDE, "last", Geometry(LAST, 6, 4, 6)),
]


@pytest.mark.parametrize(("net", "item_shape", "layer", "expected"), CASES)
def test_layouts_are_found_by_experiment(net, item_shape, layer, expected) -> None:
    """Another size or another place shows the grid; a square number of channels shows nothing."""
    _, catalogue = measured(net, item_shape)
    assert catalogue.entry(layer).geometry == expected


@pytest.mark.parametrize(("side", "wide"), [(64, 64), (64, 96)])
def test_swin_is_measured_as_channels_last(side, wide) -> None:
    """The catalogue has channels last for torchvision's Swin, up to its permutation."""
    catalogue = measure(loaded("small_swin", (3, side, wide)))
    stage = catalogue.entry("features.1").geometry
    assert stage == Geometry(LAST, 24, side // 4, wide // 4)
    assert catalogue.entry("permute").geometry == Geometry(FIRST, 48, side // 8, wide // 8)


@pytest.mark.parametrize(
    ("geometry", "shape", "item_shape", "expected"),
    [
        (Geometry(FIRST, 8, 4, 4), (1, 8, 6, 9), (3, 24, 36), Geometry(FIRST, 8, 6, 9)),
        (Geometry(LAST, 8, 4, 4), (1, 6, 9, 8), (3, 24, 36), Geometry(LAST, 8, 6, 9)),
        (Geometry(TOKENS, 8, 4, 4, 1), (1, 55, 8), (3, 24, 36), Geometry(TOKENS, 8, 6, 9, 1)),
        (Geometry(TOKENS, 8, 4, 4, 1), (1, 43, 8), (3, 26, 30), Geometry(TOKENS, 8, 6, 7, 1)),
        (Geometry(TOKENS, 8, 4, 4, 1), (1, 60, 8), (3, 24, 36), Geometry(positions=(1,))),
        (Geometry(positions=(2,)), (1, 8, 54), (3, 24, 36), Geometry(positions=(2,))),
    ],
)
def test_a_layout_holds_at_other_sizes(geometry, shape, item_shape, expected) -> None:
    """Height and width are those of the value; tokens that fit no grid are only positions."""
    assert geometry.at(shape, item_shape, SQUARE) == expected


def reduce(net: str, item_shape: tuple[int, ...], layer: str, reduction: Reduction) -> torch.Tensor:
    """Reduce a layer's value for two items, and compare the shape with the predicted one."""
    model, catalogue = measured(net, item_shape)
    x = torch.randint(0, 9, (2, *item_shape)) if net == "text" else torch.rand(2, *item_shape)
    spec = catalogue.entry(layer).specs[Capture.OUTPUT]
    made = reduced(spec, reduction, layer, model.signature.key)
    value = outputs_of(model.module, x, layer)[0]
    result = made.apply(value)
    assert tuple(result.shape) == made.spec.shape(2)
    return value, result


@pytest.mark.parametrize(
    ("net", "item_shape", "layer", "dims"),
    [
        ("mixer", SQUARE, "mlp_tokens", 2),
        ("series", (6, 32), "first", 2),
        ("series", (6, 32), "last", 1),
        ("text", (12,), "out", 1),
        ("video", (3, 4, 16, 16), "tokens", 1),
        ("pools", SQUARE, "grid", (2, 3)),
        ("batch_second", SQUARE, "second", 0),
    ],
)
def test_the_mean_is_over_what_follows_the_input(net, item_shape, layer, dims) -> None:
    """The positions of a series, or patches in any dimension, with the batch in any dimension."""
    value, pooled = reduce(net, item_shape, layer, POOL)
    assert torch.allclose(pooled, value.mean(dims), atol=1e-6)


def test_reductions_put_the_batch_in_front() -> None:
    """For [L, B, D], each row of the result is an item."""
    value, flat = reduce("batch_second", SQUARE, "second", FLATTEN)
    assert torch.equal(flat, value.transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("net", "item_shape", "layer", "reduction"),
    [
        ("queries", SQUARE, "out", POOL),
        ("queries", SQUARE, "out", CLASS),
        ("mixer", SQUARE, "mlp_tokens", CLASS),
        ("batch_second", SQUARE, "interleaved", FLATTEN),
        ("batch_second", SQUARE, "apart", POOL),
    ],
)
def test_what_is_not_known_is_refused(net, item_shape, layer, reduction) -> None:
    """A mean over the wrong dimension, or a wrong class token, would not be noticed."""
    with pytest.raises(InvalidInputError, match=f"{reduction.name} takes"):
        reduce(net, item_shape, layer, reduction)


def test_the_batch_dimension_is_measured() -> None:
    """It may be the second, and an item's elements along it may be adjacent or interleaved."""
    _, catalogue = measured("batch_second", SQUARE)
    axes = {name: catalogue.entry(name).specs[Capture.OUTPUT].batch_axis
            for name in ("stem", "second", "interleaved", "apart")}  # fmt: skip
    assert axes == {"stem": (0, 1), "second": (1, 1), "interleaved": None, "apart": (0, 16)}
    assert catalogue.entry("interleaved").specs[Capture.OUTPUT].interleaved
