"""Reductions use the image's dimensions, wherever a layer has them."""

from __future__ import annotations

import pytest
import torch

from layertap.errors import InvalidInputError
from layertap.extraction import measure
from layertap.extraction.reductions import reduced
from layertap.models import ModelSpec, load_model
from layertap.selection import Capture, Reduction
from oracle import outputs_of

WIDE = (3, 16, 24)
POOL, GRID, CLASS = Reduction.GLOBAL_AVERAGE_POOL, Reduction.TOKEN_GRID, Reduction.CLASS_TOKEN


@pytest.fixture
def net():
    """A small ViT at a size that is not square, its catalogue and a batch of two."""
    model = load_model(ModelSpec("tinynets:patches", item_shape=WIDE))
    return model, measure(model), torch.rand(2, *WIDE)


def apply(net, layer: str, reduction: Reduction) -> torch.Tensor:
    """Reduce a layer's value, and compare the shape with the prediction."""
    model, catalogue, x = net
    spec = catalogue.entry(layer).specs[Capture.OUTPUT]
    made = reduced(spec, reduction, layer, model.signature.key)
    value = made.apply(outputs_of(model.module, x, layer)[0])
    assert tuple(value.shape) == made.spec.shape(2)
    return value


@pytest.mark.parametrize("layer", ["tokens", "bare", "last", "patch"])
def test_a_grid_is_the_same_from_every_layout(net, layer) -> None:
    """Tokens with and without others in front, and both orders of channels, give the same grid."""
    grid = outputs_of(net[0].module, net[2], "patch")[0]
    assert grid.shape == (2, 6, 4, 6)
    assert torch.equal(apply(net, layer, GRID), grid)


@pytest.mark.parametrize("layer", ["tokens", "bare", "last", "patch"])
def test_the_mean_is_over_the_image_in_every_layout(net, layer) -> None:
    """Pooling gives one number per channel, from the patches alone."""
    grid = outputs_of(net[0].module, net[2], "patch")[0]
    assert torch.allclose(apply(net, layer, POOL), grid.mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_the_class_token_is_the_first(net) -> None:
    """If there are tokens before the patches, the first of them is the class token."""
    tokens = outputs_of(net[0].module, net[2], "tokens")[0]
    assert torch.equal(apply(net, "tokens", CLASS), tokens[:, 0])


@pytest.mark.parametrize("layer", ["bare", "patch"])
def test_no_class_token_is_invented(net, layer) -> None:
    """If all tokens are patches, or there are no tokens, there is no class token."""
    with pytest.raises(InvalidInputError, match=r"CLASS_TOKEN takes .*more tokens than patches"):
        apply(net, layer, CLASS)


def test_pooling_as_most_do_it_is_wrong_for_swin() -> None:
    """A mean over the last two dimensions mixes width and channels; layertap pools the image."""
    item = (3, 64, 64)
    model = load_model(ModelSpec("layoutnets:small_swin", item_shape=item))
    value = outputs_of(model.module, torch.rand(1, *item), "features.1")[0]
    spec = measure(model).entry("features.1").specs[Capture.OUTPUT]
    pooled = reduced(spec, POOL, "features.1", model.signature.key).apply(value)
    assert torch.allclose(pooled, value.mean((1, 2)), atol=1e-6)
    assert value.flatten(2).mean(2).shape != pooled.shape
