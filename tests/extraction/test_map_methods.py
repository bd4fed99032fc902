"""Eigen-CAM, guided backpropagation, tensor baselines and forms of maps, by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gradnets
import layertap
from gradient_oracle import not_in_place, with_gradients
from layertap import Capture, Extractor, LayerSelection, LocalModel, MapForm, Method, Sweep, errors
from tinynets import seeded


def wide(net: str) -> LocalModel:
    return layertap.load(
        f"gradnets:{net}", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu"
    )


def points(size: int) -> torch.Tensor:
    shape = (size, *gradnets.IMAGE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()


def eigen(value: torch.Tensor) -> torch.Tensor:
    """Return Eigen-CAM ``[B, H, W]`` of values ``[B, C, H, W]``, by torch's own decomposition."""
    maps = []
    for item in value.double():
        rows = item.flatten(1).T
        _, _, right = torch.linalg.svd(rows)
        found = rows @ right[0]
        maps.append((found if found.sum() >= 0 else -found).reshape(item.shape[1:]))
    return torch.stack(maps)


@pytest.fixture(scope="module")
def resnet() -> Iterator[LocalModel]:
    """A net whose values are [B, C, H, W]."""
    with layertap.load(
        "usualnets:resnet10", item_shape=(3, 64, 64), device="cpu", weights="random"
    ) as model:
        yield model


def images(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("layer", ["conv1", "layer2", "layer4", "layer1.0.bn1"])
def test_eigen_cam_is_the_projection_on_the_first_singular_vector(
    resnet: LocalModel, layer: str
) -> None:
    """Grids with more places than channels and the other way round agree with an SVD."""
    found = resnet.extract(images(64), [layer, f"{layer}:eigen_cam"], extractor="hook")
    expected = eigen(found[layer])
    value = found[f"{layer}:eigen_cam"]
    assert value.dtype == torch.float32
    assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (value.sum((1, 2)) >= 0).all()


def test_eigen_cam_needs_no_objective_and_any_extractor_serves_it(resnet: LocalModel) -> None:
    """It is made of the value alone, of inputs too, and a compiled program serves it."""
    selections = [
        LayerSelection("layer3", method=Method.EIGEN_CAM),
        LayerSelection("layer3", Capture.INPUT, method=Method.EIGEN_CAM),
    ]
    hook = resnet.extract(images(64), selections, extractor=Extractor.HOOK)
    assert hook["layer3:input_eigen_cam"].shape == (2, 8, 8)
    compiled = resnet.extract(images(64), selections[:1], extractor=Extractor.TORCHSCRIPT)
    assert torch.allclose(compiled["layer3:eigen_cam"], hook["layer3:eigen_cam"], rtol=1e-3)
    alone = resnet.extract(images(64)[1:], selections[:1], extractor=Extractor.HOOK)
    assert torch.allclose(alone["layer3:eigen_cam"], hook["layer3:eigen_cam"][1:], rtol=1e-3)
    with pytest.raises(errors.InvalidInputError, match="expected the capture OUTPUT or INPUT"):
        LayerSelection("layer3", Capture.GRADIENT, method=Method.EIGEN_CAM)
    with pytest.raises(errors.InvalidInputError, match="method: EIGEN_CAM takes patch tokens"):
        resnet.extract(images(64), "fc:eigen_cam")


def test_eigen_cam_of_tokens_and_of_channels_last() -> None:
    """The layout comes from the catalogue, and class tokens are left out."""
    with layertap.load("gradnets:tiny_vit", item_shape=(3, 32, 32), device="cpu") as model:
        layer = "encoder.layers.encoder_layer_0"
        found = model.extract(images(32), [layer, f"{layer}:eigen_cam"], extractor="hook")
        grid = found[layer][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        assert torch.allclose(found[f"{layer}:eigen_cam"].double(), eigen(grid), atol=1e-4)
    with layertap.load("gradnets:last", item_shape=(3, 16, 16), device="cpu") as model:
        found = model.extract(images(16), ["mix", "mix:eigen_cam"], extractor="hook")
        expected = eigen(found["mix"].movedim(-1, 1))
        assert torch.allclose(found["mix:eigen_cam"].double(), expected, atol=1e-5)


def test_eigen_cam_of_nan_is_nan_for_that_item_only(resnet: LocalModel) -> None:
    """An item that is not finite has no singular vectors, and the other item is unaffected."""
    given = images(64)
    given[0, 0, 3, 3] = float("nan")
    found = resnet.extract(given, ["layer4:eigen_cam"], extractor="hook")["layer4:eigen_cam"]
    expected = resnet.extract(images(64), ["layer4:eigen_cam"], extractor="hook")
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected["layer4:eigen_cam"][1])


class GuidedReLU(nn.Module):
    """A ReLU whose gradient is written by hand."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return gradients[0] * (gradients[0] > 0) * (x > 0)

    def __init__(self) -> None:
        super().__init__()
        self.inplace = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.Function.apply(x)


def guided(net: nn.Module) -> nn.Module:
    """Return a copy of a net whose ReLU modules are replaced."""
    net = not_in_place(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, GuidedReLU())
    return net


def test_guided_backpropagation_equals_hand_written_relus() -> None:
    """A module that is called three times is guided at each call, and the input's gradient too."""
    with wide("residual") as model:
        names = [f"{name}:guided_backpropagation" for name in ("inputs.x", "bn1", "relu", "relu_1")]
        found = model.extract(points(2), [*names, "bn1:gradient"], objective="fc[1]")
        alone = model.extract(points(2)[:1], names[0], objective="fc[1]")
    with with_gradients():
        net = guided(gradnets.residual())
        assert isinstance(net, gradnets.Residual)
        x = points(2).clone().requires_grad_(True)
        bn1 = net.bn1(net.conv1(x))
        first = net.relu(bn1)
        second = net.relu(net.conv2(first))
        scores = net.fc(net.pool(net.relu(second + first)).flatten(1))
        wanted = torch.autograd.grad(scores[:, 1].sum(), [x, bn1, first, second])
    for name, expected in zip(names, wanted, strict=True):
        assert (found[name] - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert torch.allclose(alone[names[0]], found[names[0]][:1], rtol=1e-9)
    assert [found[f"{name}.relus"].tolist() for name in names] == [[3, 3], [3, 3], [2, 2], [1, 1]]
    # The plain gradient of the same request is not guided.
    assert not torch.allclose(found["bn1:gradient"], found[names[1]], rtol=1e-3)
    with wide("residual") as model:
        plain = model.extract(points(2), "bn1:gradient", objective="fc[1]")
    assert torch.equal(plain["bn1:gradient"], found["bn1:gradient"])


class Functional(nn.Module):
    """Calls relu as a function, as a method and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 4, 3)
        self.c = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = self.b(x).relu()
        x = nn.functional.relu(self.c(x), inplace=True)
        return self.fc(x.mean((2, 3)))


def functional() -> nn.Module:
    """Return a seeded Functional."""
    return seeded(Functional).double()


def test_relus_that_are_no_modules_are_guided_too() -> None:
    """The gradient is that of the same net with guided modules, and the number of ReLUs is told."""
    with layertap.load(
        f"{__name__}:functional", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu"
    ) as model:
        found = model.extract(points(2), "a:guided_backpropagation", objective="fc[1]")
    with with_gradients():
        net = functional()
        assert isinstance(net, Functional)
        relu = GuidedReLU()
        value = net.a(points(2).clone()).detach().requires_grad_(True)
        scores = net.fc(relu(net.c(relu(net.b(relu(value))))).mean((2, 3)))
        (expected,) = torch.autograd.grad(scores[:, 1].sum(), value)
    assert torch.allclose(found["a:guided_backpropagation"], expected, rtol=1e-9)
    assert found["a:guided_backpropagation.relus"].tolist() == [3, 3]


def test_a_model_without_relus_is_refused() -> None:
    """Without a ReLU on the way it would be the plain gradient, so there is an error instead."""
    with (
        wide("smooth") as model,
        pytest.raises(errors.InvalidInputError, match="no ReLU is on the way"),
    ):
        model.extract(points(1), "conv:guided_backpropagation", objective="fc[1]")
    with (
        wide("residual") as model,
        pytest.raises(errors.InvalidInputError, match="'pool': no ReLU is on the way"),
    ):
        model.extract(
            points(1),
            ["conv1:guided_backpropagation", "pool:guided_backpropagation"],
            objective="fc[1]",
        )


def test_the_number_of_relus_has_a_name_of_its_own(resnet: LocalModel) -> None:
    """Another output can't take the name of the number that comes with a guided gradient."""
    layers = ["layer1:guided_backpropagation", "layer2=layer1:guided_backpropagation.relus"]
    with pytest.raises(errors.InvalidInputError, match="two outputs are called"):
        resnet.extract(images(64), layers, objective="fc[1]")


def swept(base: Any) -> LayerSelection:
    sweep = Sweep(steps=9, baseline=base)
    return LayerSelection("conv", Capture.GRADIENT, method=Method.INTEGRATED_GRADIENTS, sweep=sweep)


def integrated(value: torch.Tensor, base: torch.Tensor, run: Callable[..., Any]) -> torch.Tensor:
    nodes, weights = np.polynomial.legendre.leggauss(9)
    total = torch.zeros_like(value)
    for node, weight in zip(nodes, weights, strict=True):
        here = (base + (value - base) * (float(node) + 1) / 2).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(run(here).sum(), here)
        total = total + slope * float(weight) / 2
    return total * (value - base)


@pytest.mark.parametrize("each", [False, True])
def test_a_baseline_may_be_a_tensor(each: bool) -> None:
    """One for all items or one for each, and the gap is that to the objective at the baseline."""
    shape = (4, 6, 6)
    base = torch.randn((2, *shape) if each else shape, generator=torch.Generator().manual_seed(6))
    name = "conv:integrated_gradients"
    with wide("smooth") as model:
        found = model.extract(points(2), swept(base), objective="fc[1]")
        as_array = model.extract(points(2), swept(base.numpy()), objective="fc[1]")
        zero = model.extract(points(2), swept(np.zeros(shape)), objective="fc[1]")
        number = model.extract(points(2), swept(0.0), objective="fc[1]")
    with with_gradients():
        net = gradnets.smooth()
        assert isinstance(net, gradnets.Smooth)

        def run(value: torch.Tensor) -> torch.Tensor:
            value = net.act(net.more(net.act(value)))
            return net.fc((value * value).mean((2, 3)))[:, 1]

        value = net.conv(points(2).clone()).detach()
        wanted = base.clone().double().expand_as(value)
        expected = integrated(value, wanted, run)
        gap = expected.flatten(1).sum(1) - (run(value) - run(wanted)).detach()
    assert (found[name] - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert torch.allclose(found[f"{name}.gap"].double(), gap, atol=1e-6)
    assert torch.equal(as_array[name], found[name])
    assert torch.allclose(zero[name], number[name], rtol=1e-12)


def test_a_tensor_baseline_for_items_that_influence_each_other() -> None:
    """Where each item runs by itself, it has its own part of the baseline."""
    base = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(6))
    sweep = Sweep(steps=3, baseline=base)

    def selection(sweep: Sweep) -> LayerSelection:
        return LayerSelection("act", "gradient", method="integrated_gradients", sweep=sweep)  # type: ignore[arg-type]

    name = "act:integrated_gradients"
    with wide("coupled") as model:
        found = model.extract(points(2), selection(sweep), objective="fc[1]")
        for item in range(2):
            own = selection(Sweep(steps=3, baseline=base[item]))
            alone = model.extract(points(2)[item : item + 1], own, objective="fc[1]")
            assert torch.allclose(found[name][item : item + 1], alone[name], rtol=1e-9)


def test_baselines_that_do_not_fit_are_refused() -> None:
    """The error names the shapes that fit; NaN and whole numbers are refused before that."""
    with wide("smooth") as model:
        for shape in [(4, 6, 5), (3, 4, 6, 6), (1,), ()]:
            with pytest.raises(errors.InvalidInputError, match=r"expected \[4, 6, 6\] for all"):
                model.extract(points(2), swept(np.zeros(shape)), objective="fc[1]")
    with pytest.raises(errors.InvalidInputError, match="got NaN or infinity"):
        Sweep(baseline=np.array([1.0, float("nan")]))
    with pytest.raises(errors.InvalidInputError, match="got int64, expected float64"):
        Sweep(baseline=np.zeros(3, np.int64))


def test_plans_do_not_keep_baselines() -> None:
    """Requests with other tensors share one plan, so a tensor is no part of what is kept."""
    with wide("smooth") as model:
        model.extract(points(2), swept(np.zeros((4, 6, 6))), objective="fc[1]")
        before = len(model.host.plans._built)
        for number in range(3):
            base = np.full((4, 6, 6), float(number))
            model.extract(points(2), swept(base), objective="fc[1]")
        assert len(model.host.plans._built) == before


def test_resized_maps_have_the_size_of_the_input(resnet: LocalModel) -> None:
    """A map is interpolated between the centres of its pixels, with its sign."""
    names = ["layer3:grad_cam", "layer3:eigen_cam"]
    plain = resnet.extract(images(64), names, objective="fc[1]")
    found = resnet.extract(images(64), [f"{name}:map=resized" for name in names], objective="fc[1]")
    for name in names:
        assert found[name].shape == (2, 64, 64)
        maps = plain[name].double().numpy()
        # Each new pixel lies between two old ones, at the distance of its centre from theirs.
        place = ((np.arange(64) + 0.5) * maps.shape[1] / 64 - 0.5).clip(0, maps.shape[1] - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, maps.shape[1] - 1)
        part = place - low
        rows = maps[:, low] * (1 - part)[:, None] + maps[:, high] * part[:, None]
        expected = rows[:, :, low] * (1 - part) + rows[:, :, high] * part
        assert np.abs(found[name].numpy() - expected).max() <= 1e-5 * np.abs(maps).max()


def test_overlays_show_the_image_that_the_model_was_given(
    resnet: LocalModel, tmp_path: Path
) -> None:
    """Where the map is strongest the pixel is red or blue, where it is zero the image's gray."""
    noise = np.random.default_rng(1).integers(0, 256, (80, 100, 3), np.uint8)
    file = tmp_path / "photo.png"
    Image.fromarray(noise).save(file)
    layers = ["layer4:hires_cam:map=overlay=over", "layer4:hires_cam:map=resized=map"]
    found = resnet.extract(str(file), layers, objective="fc[1]")
    over, values = found["over"].numpy()[0].astype(float), found["map"].numpy()[0]
    assert found["over"].dtype == torch.uint8
    assert over.shape == (64, 64, 3)
    # The pixels, from the preprocessed image.
    given = resnet.host.model.preprocess
    assert given is not None
    normal = given(Image.fromarray(noise)).numpy()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = np.rint((normal.transpose(1, 2, 0) * std + mean) * 255)
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    share = (values / np.abs(values).max())[..., None]
    red, blue = np.array([255.0, 32.0, 0.0]), np.array([0.0, 64.0, 255.0])
    colour = np.where(share >= 0, red, blue)
    expected = gray[..., None] * (1 - 0.75 * np.abs(share)) + colour * 0.75 * np.abs(share)
    assert np.abs(over - expected).max() <= 1.01


def test_forms_of_what_is_no_map_are_refused() -> None:
    """Only maps have a form; an overlay needs to know the images' normalisation."""
    with pytest.raises(errors.InvalidInputError, match="which is no map; maps are GRAD_CAM"):
        LayerSelection.parse("layer4:gradient:map=resized")
    with pytest.raises(errors.InvalidInputError, match="expected one of grid, resized, overlay"):
        LayerSelection.parse("layer4:grad_cam:map=png")
    with (
        layertap.load("gradnets:last_without_images", item_shape=(5, 16, 16)) as model,
        pytest.raises(errors.InvalidInputError, match="map: OVERLAY takes a model with image"),
    ):
        model.extract(
            torch.rand(1, 5, 16, 16),
            LayerSelection("mix", method=Method.EIGEN_CAM, map_form=MapForm.OVERLAY),
        )
