"""Methods of gradients equal their formulas, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import gradnets
import layertap
from gradient_oracle import not_in_place, with_gradients
from layertap import (
    Capture,
    IntegrationRule,
    LayerSelection,
    LocalModel,
    Method,
    Sweep,
    errors,
)
from layertap.extraction.attribution import attribution
from layertap.extraction.points import ValueSpec
from layertap.models import Batch

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
    with layertap.load(
        "usualnets:resnet10", item_shape=(3, 64, 64), device="cpu", weights="random"
    ) as model:
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
        # A layer norm that follows makes the sums over channels cancel almost completely.
        scale = float(formula(value.abs(), gradient.abs()).abs().max())
        error = float((found[f"{layer}:{name}"] - formula(value, gradient)).abs().max())
        assert error <= 1e-5 * scale


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
    with pytest.raises(errors.InvalidInputError, match="method: GRAD_CAM takes patch tokens"):
        convolutions.extract(images(64), "fc:grad_cam", objective="fc[0]")


def test_the_gap_has_a_name_of_its_own(convolutions: LocalModel) -> None:
    """An alias that is the name of another layer's gap is refused, whichever comes first."""
    gapped = LayerSelection(
        "layer4", Capture.GRADIENT, method=Method.INTEGRATED_GRADIENTS, alias="x"
    )
    other = LayerSelection("layer3", Capture.GRADIENT, alias="x.gap")
    for selections in ([gapped, other], [other, gapped]):
        with pytest.raises(errors.InvalidInputError, match=r"two outputs are called 'x\.gap'"):
            convolutions.extract(images(64), selections, objective="fc[0]")


def test_each_term_that_finds_an_element_reports_it(convolutions: LocalModel) -> None:
    """The indices of two maxima have two names, and are those of the values themselves."""
    found = convolutions.extract(
        images(64), ["layer4:gradient", "layer4", "fc"], objective="fc[maximum] - layer4[maximum]"
    )
    assert found["objective.index"].tolist() == found["fc"].argmax(1, keepdim=True).tolist()
    best = found["layer4"].flatten(1).argmax(1)
    places = torch.stack(torch.unravel_index(best, found["layer4"].shape[1:]), 1)
    assert torch.equal(found["objective.index_1"], places)


def test_only_methods_that_use_the_value_keep_it() -> None:
    """A plain gradient costs no memory for the layer's value."""
    spec = ValueSpec.from_batches(torch.float32, (1, 4, 8, 8), (2, 4, 8, 8))
    key = Batch({"x": torch.zeros(1, 3, 8, 8)}).key
    for method, keeps in (
        (Method.GRADIENT, False),
        (Method.GUIDED_BACKPROPAGATION, False),
        (Method.INTEGRATED_GRADIENTS, False),
        (Method.GRADIENT_X_ACTIVATION, True),
    ):
        assert attribution(method, spec, "layer", key).needs_value is keeps


def test_a_method_of_a_value_is_refused() -> None:
    """A method needs a gradient to make something of."""
    with pytest.raises(errors.InvalidInputError, match="expected the capture GRADIENT"):
        LayerSelection("layer3", Capture.OUTPUT, method=Method.GRAD_CAM)


def wide(net: str) -> LocalModel:
    return layertap.load(
        f"gradnets:{net}", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu"
    )


def points(size: int) -> torch.Tensor:
    shape = (size, *gradnets.IMAGE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()


def integrated(
    run: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, sweep: Sweep
) -> torch.Tensor:
    """Integrate the gradient of a function along the way from the baseline, one step at a time."""
    count, base = sweep.steps, sweep.baseline
    if sweep.rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(count)
        steps = list(zip((nodes + 1) / 2, weights / 2, strict=True))
    elif sweep.rule == "trapezoid":
        ends = [0.5 if at in (0, count - 1) else 1.0 for at in range(count)]
        steps = [(at / (count - 1), end / (count - 1)) for at, end in enumerate(ends)]
    else:
        shift = {"left": 0.0, "middle": 0.5, "right": 1.0}[sweep.rule]
        steps = [((at + shift) / count, 1 / count) for at in range(count)]
    total = torch.zeros_like(value)
    for at, weight in steps:
        with with_gradients():
            here = (base + (value.clone() - base) * float(at)).requires_grad_(True)
            (slope,) = torch.autograd.grad(run(here).sum(), here)
        total = total + slope * float(weight)
    return total * (value - base)


@pytest.mark.parametrize("rule", list(IntegrationRule))
def test_integrated_gradients_of_the_input(rule: IntegrationRule) -> None:
    """Every rule gives what a loop over single gradients gives, and the gap is told."""
    # At this baseline another class is the best one.
    sweep = Sweep(steps=7, rule=rule, baseline=3.0)
    selection = LayerSelection(
        "inputs.x", Capture.GRADIENT, method=Method.INTEGRATED_GRADIENTS, sweep=sweep
    )
    with wide("residual") as model:
        found = model.extract(points(2), selection, objective="fc[maximum]")
    with with_gradients():
        net = not_in_place(gradnets.residual())
        best = net(points(2).clone()).argmax(1)
        expected = integrated(
            lambda x: net(x).gather(1, best.clone()[:, None]), points(2).clone(), sweep
        )
        ends = (points(2).clone(), torch.full((2, *gradnets.IMAGE), 3.0).double())
        scores = [net(x).gather(1, best.clone()[:, None])[:, 0].detach() for x in ends]
    value = found["inputs.x:integrated_gradients"]
    assert (value - expected).abs().max() <= 1e-9 * expected.abs().max()
    gap = expected.flatten(1).sum(1) - (scores[0] - scores[1])
    assert torch.allclose(found["inputs.x:integrated_gradients.gap"], gap, atol=1e-9)


def test_more_steps_close_the_gap() -> None:
    """Integrated gradients add up to the difference of the objective, the better the more steps."""
    with wide("smooth") as model:
        gaps = []
        for steps in (2, 20):
            selection = LayerSelection(
                "act", "gradient", method="integrated_gradients", sweep=Sweep(steps=steps)
            )  # type: ignore[arg-type]
            found = model.extract(points(2), selection, objective="fc[1]")
            gaps.append(float(found["act:integrated_gradients.gap"].abs().max()))
    assert gaps[1] <= 1e-9
    assert gaps[1] < gaps[0]


def test_integrated_gradients_of_the_embedding_of_a_token_model() -> None:
    """A layer in the middle is swept itself, so token models have integrated gradients too."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 10, 9, 3, 3, 3]])
    sweep = Sweep(steps=5)
    selection = LayerSelection("embed", "gradient", method="integrated_gradients", sweep=sweep)  # type: ignore[arg-type]
    with layertap.load(
        "gradnets:tokens", item_shape=(6,), input_dtype="int64", device="cpu"
    ) as model:
        found = model.extract(ids, selection, objective="head[2,3]")
        alone = model.extract(ids[1:], selection, objective="head[2,3]")
    with with_gradients():
        net = gradnets.tokens()
        assert isinstance(net, gradnets.Tokens)
        expected = integrated(
            lambda value: net.head(net.block(value))[:, 2, 3],
            net.embed(ids.clone()).detach(),
            sweep,
        )
    value = found["embed:integrated_gradients"]
    assert (value - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert torch.allclose(value[1:], alone["embed:integrated_gradients"], rtol=1e-12)


def test_sweeps_of_items_that_influence_each_other_run_one_by_one() -> None:
    """The steps of a sweep don't influence each other where the items of a batch would."""
    sweep = Sweep(steps=4)
    selection = LayerSelection("act", "gradient", method="integrated_gradients", sweep=sweep)  # type: ignore[arg-type]
    with wide("coupled") as model:
        found = model.extract(points(2), selection, objective="fc[1]")
    for item in range(2):
        with with_gradients():
            net = gradnets.coupled()
            assert isinstance(net, gradnets.Coupled)

            def run(x: torch.Tensor, net: gradnets.Coupled = net) -> torch.Tensor:
                return net.fc((x * x.mean(0)).mean((2, 3)))[:, 1]

            value = net.act(net.conv(points(2)[item : item + 1].clone())).detach()
            expected = integrated(run, value, sweep)
        got = found["act:integrated_gradients"][item : item + 1]
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_smooth_grad() -> None:
    """Its noise is seeded, the same for each item, and as wide as was asked for."""

    def selection(seed: int, noise: float) -> LayerSelection:
        sweep = Sweep(steps=6, seed=seed, noise=noise)
        return LayerSelection("inputs.x", Capture.GRADIENT, method=Method.SMOOTH_GRAD, sweep=sweep)

    name = "inputs.x:smooth_grad"
    with wide("smooth") as model:
        both = model.extract(points(2), selection(1, 0.1), objective="fc[1]")[name]
        alone = model.extract(points(2)[1:], selection(1, 0.1), objective="fc[1]")[name]
        other = model.extract(points(2), selection(2, 0.1), objective="fc[1]")[name]
        none = model.extract(points(2), [selection(1, 0.0), "inputs.x:gradient"], objective="fc[1]")
    assert torch.allclose(both[1:], alone, rtol=1e-9)
    assert not torch.allclose(both, other, rtol=1e-3)
    assert torch.allclose(none[name], none["inputs.x:gradient"], rtol=1e-12)


@pytest.mark.parametrize(
    "sweep",
    [{"steps": 0}, {"steps": 1001}, {"steps": 1, "rule": "trapezoid"}, {"noise": -1.0},
     {"noise": float("nan")}, {"baseline": float("inf")}, {"seed": -1}, {"rule": "simpson"}],
)  # fmt: skip
def test_sweeps_out_of_range_are_refused(sweep: dict[str, object]) -> None:
    """The error names the option, what was got and what was expected."""
    with pytest.raises(errors.InvalidInputError, match="got"):
        Sweep(**sweep)  # type: ignore[arg-type]


def test_a_value_that_is_overwritten_after_its_last_use() -> None:
    """The product has the value of its moment, even if the model clears its memory afterwards."""
    with wide("clears") as model:
        layers = ["same", "same:gradient", "same:gradient_x_activation"]
        found = model.extract(points(2), layers, objective="[1]")
    assert found["same"].abs().max() > 0
    product = found["same"] * found["same:gradient"]
    assert torch.equal(found["same:gradient_x_activation"], product)
