"""Methods of gradients equal their formulas, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import layertap
from layertap import Capture, LayerSelection, LocalModel, Method, errors

MAPS = ["grad_cam", "hires_cam", "layer_cam", "grad_cam_plus_plus"]


def grad_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bc,bchw->bhw", g.mean((2, 3)), a)


def hires_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bchw,bchw->bhw", a, g)


def layer_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bchw,bchw->bhw", a, g.clamp(min=0))


def grad_cam_plus_plus(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    # As in the paper, one channel at a time.
    maps = torch.zeros(a.shape[0], *a.shape[2:])
    for item in range(a.shape[0]):
        for channel in range(a.shape[1]):
            here, slope = a[item, channel], g[item, channel]
            below = 2 * slope**2 + here.sum() * slope**3
            alpha = torch.where(slope != 0, slope**2 / below, 0)
            maps[item] += (alpha * slope.relu()).sum() * here
    return maps


FORMULAS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "grad_cam": grad_cam,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
}


@pytest.fixture(scope="module")
def convolutions() -> Iterator[LocalModel]:
    """A net whose values are [B, C, H, W]."""
    with layertap.load("resnet18", weights="random", item_shape=(3, 64, 64), device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def tokens() -> Iterator[LocalModel]:
    """A net whose values are a class token and a row of patches."""
    with layertap.load("gradnets:tiny_vit", item_shape=(3, 32, 32), device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def channels_last() -> Iterator[LocalModel]:
    """A net whose values are [B, H, W, C]."""
    with layertap.load("gradnets:last", item_shape=(3, 16, 16), device="cpu") as model:
        yield model


def images(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4))


def close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((value - expected).abs().max() <= 1e-4 * expected.abs().max())


def check(
    model: LocalModel, layer: str, side: int, grid: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Compare each map with its formula, on the value and gradient of the same request."""
    wanted = [layer, f"{layer}:gradient", *(f"{layer}:{name}" for name in MAPS)]
    found = model.extract(images(side), wanted, objective="[1]")
    value, gradient = grid(found[layer]), grid(found[f"{layer}:gradient"])
    assert value.dim() == 4
    for name, formula in FORMULAS.items():
        assert close(found[f"{layer}:{name}"], formula(value, gradient))


def test_maps_of_channels_first(convolutions: LocalModel) -> None:
    """Maps of convolutions are sums over the channels."""
    check(convolutions, "layer3", 64, lambda value: value)


def test_maps_of_tokens_leave_out_the_class_token(tokens: LocalModel) -> None:
    """Maps of a vision transformer have the grid of its patches."""
    layer = "encoder.layers.encoder_layer_0"
    check(tokens, layer, 32, lambda v: v[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


def test_maps_of_channels_last(channels_last: LocalModel) -> None:
    """Maps of values with the channels at the end are sums over the last dimension."""
    check(channels_last, "mix", 16, lambda value: value.movedim(-1, 1))


def test_gradient_times_activation(convolutions: LocalModel) -> None:
    """The product has the shape of the layer, also for what a layer was given."""
    selections = [
        "layer2",
        "layer2:gradient",
        "layer2:gradient_x_activation",
        "layer3:input",
        LayerSelection("layer3", Capture.INPUT_GRADIENT, method=Method.GRADIENT_X_ACTIVATION),
    ]
    found = convolutions.extract(images(64), selections, objective="[maximum]")
    product = found["layer2"] * found["layer2:gradient"]
    assert torch.equal(found["layer2:gradient_x_activation"], product)
    assert close(found["layer3:input_gradient_x_activation"], product)


def test_methods_of_one_layer_share_one_copy_and_agree_with_single_requests(
    convolutions: LocalModel,
) -> None:
    """Asking for several methods of a layer gives the bits of asking for each alone."""
    names = [f"layer3:{name}" for name in (*MAPS, "gradient")]
    found = convolutions.extract(images(64), names, objective="fc[2]")
    for name in names:
        alone = convolutions.extract(images(64), name, objective="fc[2]")
        assert torch.equal(found[name], alone[name])


def test_a_value_before_an_in_place_relu_is_the_one_of_that_moment(
    convolutions: LocalModel,
) -> None:
    """The map of a batch norm has the values before the ReLU that follows in place."""
    check(convolutions, "layer2.0.bn1", 64, lambda value: value)


def test_maps_need_a_grid(convolutions: LocalModel) -> None:
    """A layer without a grid has no map, and the error says which layouts have."""
    with pytest.raises(errors.InvalidInputError, match="GRAD_CAM needs patch tokens"):
        convolutions.extract(images(64), "fc:grad_cam", objective="fc[0]")


def test_a_method_of_a_value_is_refused() -> None:
    """A method needs a gradient to make something of."""
    with pytest.raises(errors.InvalidInputError, match="expected the capture GRADIENT"):
        LayerSelection("layer3", Capture.OUTPUT, method=Method.GRAD_CAM)
