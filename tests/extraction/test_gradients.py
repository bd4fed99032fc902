"""Gradients equal those of plain PyTorch, for every value of awkward networks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import gradnets
import layertap
from gradient_oracle import by_autograd, by_differences, by_perturbation, with_gradients
from layertap import LocalModel, Objective, errors
from layertap.extraction.containers import replaced

TOLERANCE = 1e-6


def load(net: str, **settings: object) -> LocalModel:
    shape = gradnets.TOKENS if net == "tokens" else gradnets.IMAGE
    dtype = "int64" if net == "tokens" else "float64"
    return layertap.load(
        f"gradnets:{net}", item_shape=shape, input_dtype=dtype, device="cpu", **settings
    )  # type: ignore[arg-type]


def images(size: int = 2) -> torch.Tensor:
    return torch.randn(size, *gradnets.IMAGE, generator=torch.Generator().manual_seed(1)).double()


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def residual() -> Iterator[LocalModel]:
    """The net with in-place modules."""
    with load("residual") as loaded:
        yield loaded


def score_of_class(result: torch.Tensor) -> torch.Tensor:
    return result[:, 2].sum()


CALLS = {
    "conv1": ("conv1", 0),
    "bn1": ("bn1", 0),
    "relu": ("relu", 0),
    "shortcut": ("shortcut", 0),
    "conv2": ("conv2", 0),
    "relu_1": ("relu", 1),
    "relu_2": ("relu", 2),
    "pool": ("pool", 0),
    "fc": ("fc", 0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("before", [False, True])
def test_gradients_of_values_that_are_changed_in_place_later(
    residual: LocalModel, name: str, before: bool
) -> None:
    """Each call's output and input has the gradient of the value at that moment."""
    path, call = CALLS[name]
    layer = f"{name}:{'input_gradient' if before else 'gradient'}"
    found = residual.extract(images(), layer, objective="fc[2]")
    expected = by_autograd(gradnets.residual, images(), score_of_class, path, call, before=before)
    assert error(found[layer], expected) <= TOLERANCE


def test_all_gradients_of_one_request_are_those_of_single_requests(residual: LocalModel) -> None:
    """Gradients of several layers, and their values, don't disturb each other."""
    layers = [f"{name}:gradient" for name in CALLS]
    found = residual.extract(images(), [*layers, *CALLS], objective="fc[2]")
    plain = residual.extract(images(), list(CALLS), extractor="hook")
    for layer, name in zip(layers, CALLS, strict=True):
        path, call = CALLS[name]
        expected = by_autograd(gradnets.residual, images(), score_of_class, path, call)
        assert error(found[layer], expected) <= TOLERANCE
        assert torch.equal(found[name], plain[name])


def test_gradients_of_the_models_input(residual: LocalModel) -> None:
    """The model's own input has a gradient, as the layer ``inputs.NAME``."""
    found = residual.extract(images(), "inputs.x:gradient", objective="fc[2]")
    direction = torch.randn_like(images())
    expected = by_differences(gradnets.residual(), images(), score_of_class, direction)
    assert float((found["inputs.x:gradient"] * direction).sum()) == pytest.approx(
        expected, rel=1e-6
    )


MEMBERS = {
    "split.low": ("split", ("low",)),
    "split.high": ("split", ("high",)),
    "named.sum": ("named", ("sum",)),
    "named.parts.0": ("named", ("parts", "0")),
    "named.parts.1": ("named", ("parts", "1")),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_of_members_of_containers(name: str) -> None:
    """A member of a named tuple, a dict or a list in it has its own gradient."""
    path, way = MEMBERS[name]
    with load("splits") as model:
        found = model.extract(
            images(), [f"{name}:gradient", name], objective=Objective.sum("output.scores")
        )
    gradient = found[f"{name}:gradient"]
    direction = torch.randn_like(gradient)

    def change(value: object, more: torch.Tensor) -> object:
        old = value
        for key in way:
            old = (
                getattr(old, key, None)
                if isinstance(old, tuple)
                else (
                    old[int(key)] if isinstance(old, list) else old[key]  # type: ignore[index]
                )
            )
        assert isinstance(old, torch.Tensor)
        return replaced(value, way, old + more)

    expected = by_perturbation(
        gradnets.splits(),
        images(),
        lambda result: result["scores"].sum(),
        change,
        path=path,
        direction=direction,
    )
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layer", ["embed", "block", "block.linear1", "block.norm1", "head"])
def test_gradients_of_a_token_model(layer: str) -> None:
    """A model of token ids has the gradient of its embedding's output and of later layers."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 10, 9, 3, 3, 3]])
    aim = Objective.element("head", [(5, 1), (2, 7)])
    with load("tokens") as model:
        found = model.extract(ids, f"{layer}:gradient", objective=aim)

    def score(result: torch.Tensor) -> torch.Tensor:
        return result[0, 5, 1] + result[1, 2, 7]

    expected = by_autograd(gradnets.tokens, ids, score, layer)
    assert error(found[f"{layer}:gradient"], expected) <= TOLERANCE


def test_gradients_where_the_batch_is_the_second_dimension() -> None:
    """Items are found in [L, B, C], and an item's value may be a single number."""
    with load("batch_second") as model:
        found = model.extract(
            images(3), ["lstm.0:gradient", "inputs.x:gradient"], objective=Objective.element("", ())
        )
        assert found["lstm.0:gradient"].shape == (8, 3, 5)
        assert found["objective.value"].shape == (3,)
        direction = torch.randn_like(images(3))
        expected = by_differences(gradnets.batch_second(), images(3), torch.sum, direction)
        got = float((found["inputs.x:gradient"] * direction).sum())
    assert got == pytest.approx(expected, rel=1e-6)


def test_items_that_influence_each_other_run_alone() -> None:
    """In a batch whose items influence each other, each has the gradient that it has alone."""
    with load("coupled") as model:
        together = model.extract(images(3), ["act:gradient", "act"], objective="fc[1]")
        for item in range(3):
            one = images(3)[item : item + 1]
            alone = model.extract(one, ["act:gradient", "act"], objective="fc[1]")
            for name in ("act:gradient", "act", "objective.value"):
                assert torch.equal(together[name][item : item + 1], alone[name])
        expected = by_autograd(gradnets.coupled, images(3)[:1], lambda r: r[:, 1].sum(), "act")
    assert error(together["act:gradient"][:1], expected) <= TOLERANCE


def probabilities(result: torch.Tensor) -> torch.Tensor:
    return result.log_softmax(-1)


VECTOR = np.linspace(-1, 1, 5)

OBJECTIVES = {
    "element": (Objective.element("fc", -1), lambda r: r[:, -1]),
    "per item": (Objective.element("fc", [1, 3]), lambda r: torch.stack([r[0, 1], r[1, 3]])),
    "maximum": (Objective.maximum("fc"), lambda r: r.amax(1)),
    "sum": (Objective.sum("fc"), lambda r: r.sum(1)),
    "mean": (Objective.mean("fc"), lambda r: r.mean(1)),
    "norm": (Objective.norm("fc"), lambda r: r.norm(dim=1)),
    "log probability": (Objective.log_probability("fc", 4), lambda r: probabilities(r)[:, 4]),
    "most probable": (Objective.log_probability("fc"), lambda r: probabilities(r).amax(1)),
    "dot": (Objective.dot("fc", VECTOR), lambda r: r @ torch.tensor(VECTOR)),
    "dot per item": (
        Objective.dot("fc", np.stack([VECTOR, -2 * VECTOR])),
        lambda r: (r * torch.tensor(np.stack([VECTOR, -2 * VECTOR]))).sum(1),
    ),
    "difference": (
        Objective.element("fc", 0) - 0.5 * Objective.maximum("fc"),
        lambda r: r[:, 0] - 0.5 * r.amax(1),
    ),
    "the model's result": (Objective.element("", 2), lambda r: r[:, 2]),
    "text": (Objective.parse("fc[1] - fc[3]"), lambda r: r[:, 1] - r[:, 3]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(residual: LocalModel, name: str) -> None:
    """Each measure's number is that of the result, and its gradient that of the number."""
    objective, numbers = OBJECTIVES[name]
    found = residual.extract(images(), "conv2:gradient", objective=objective)
    with torch.no_grad():
        result = gradnets.residual().eval()(images())
    assert torch.allclose(found["objective.value"], numbers(result), rtol=1e-12)
    expected = by_autograd(gradnets.residual, images(), lambda r: numbers(r).sum(), "conv2")
    assert error(found["conv2:gradient"], expected) <= TOLERANCE
    if "maximum" in name or "probable" in name:
        assert found["objective.index"].tolist() == result.argmax(1, keepdim=True).tolist()


def test_an_index_may_lead_to_a_part_of_a_layer(residual: LocalModel) -> None:
    """A measure of one channel's map has the gradient of that part of the value only."""
    aim = Objective.mean("conv2", 3) + Objective.maximum("bn1", (1, 2))
    found = residual.extract(images(), ["conv2:gradient", "bn1"], objective=aim)
    expected = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    expected[:, 3] = 1 / 64
    assert torch.allclose(found["conv2:gradient"], expected, atol=0)
    best = found["bn1"][:, 1, 2].argmax(-1)
    assert found["objective.index"].tolist() == [[1, 2, int(each)] for each in best]


def test_gradients_are_reduced_and_sent_like_values(residual: LocalModel) -> None:
    """Reductions, dtypes and aliases apply to gradients."""
    selection = layertap.LayerSelection(
        "conv2", "gradient", alias="weights", reduction="global_average_pool", dtype="float32"
    )  # type: ignore[arg-type]
    found = residual.extract(images(), [selection, "conv2:gradient"], objective="fc[2]")
    assert found["weights"].dtype is torch.float32
    assert torch.allclose(found["weights"].double(), found["conv2:gradient"].mean((2, 3)))


def test_a_glob_matches_every_layer_that_has_a_gradient(residual: LocalModel) -> None:
    """A glob of gradients leaves nothing out and needs nothing more than one of values."""
    found = residual.extract(images(), "**:gradient", objective="[2]")
    names = {f"{name}:gradient" for name in CALLS}
    assert set(found) == names | {"objective.value"}


def test_requests_share_nothing(residual: LocalModel) -> None:
    """No request writes a gradient to the model, or needs one of an earlier request."""
    first = residual.extract(images(), "conv1:gradient", objective="fc[0]")
    residual.extract(images(), "conv1:gradient", objective="fc[1]")
    again = residual.extract(images(), "conv1:gradient", objective="fc[0]")
    assert torch.equal(first["conv1:gradient"], again["conv1:gradient"])
    module = residual.host.model.module
    assert all(each.grad is None and not each.requires_grad for each in module.parameters())


REFUSED = {
    "no objective": (["conv1:gradient"], None, errors.InvalidInputError, "objective: got none"),
    "no gradient": (["conv1"], "fc[0]", errors.InvalidInputError, "objective: got one, but"),
    "index too large": (["conv1:gradient"], "fc[5]", errors.InvalidInputError, "from -5 to 4"),
    "index too long": (["conv1:gradient"], "fc[1,1]", errors.InvalidInputError, "expected 1"),
    "three places for two items": (
        ["conv1:gradient"],
        Objective.element("fc", [0, 1, 2]),
        errors.InvalidInputError,
        "got 3 places",
    ),
    "vector of another shape": (
        ["conv1:gradient"],
        Objective.dot("fc", np.ones(4)),
        errors.InvalidInputError,
        r"got \[4\], expected \[5\]",
    ),
    "no such layer": (["conv1:gradient"], "nix[0]", errors.LayerNotFoundError, "no layer 'nix'"),
    "later layer": (["fc:gradient"], "conv2[sum]", errors.InvalidInputError, "returns after"),
    "later input": (["fc:input_gradient"], "bn1[sum]", errors.InvalidInputError, "does not depend"),
    "two of one name": (
        ["conv1:gradient", "fc:gradient=objective.value"],
        "fc[0]",
        errors.InvalidInputError,
        "two outputs",
    ),
    "no such input": (["inputs.y:gradient"], "fc[0]", errors.LayerNotFoundError, "'inputs.x'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_make_no_sense_are_refused(residual: LocalModel, case: str) -> None:
    """The error says what is wrong with the objective or the selection."""
    layers, objective, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        residual.extract(images(), layers, objective=objective)


@pytest.mark.parametrize("extractor", ["fx", "torchscript", "layer_getter", "children"])
def test_extractors_without_gradients_refuse(residual: LocalModel, extractor: str) -> None:
    """An extractor that can't compute gradients says which one can."""
    with pytest.raises(errors.ExtractorUnsupportedError, match="HOOK"):
        residual.extract(images(), "conv1:gradient", objective="fc[0]", extractor=extractor)


@pytest.mark.parametrize(
    ("layer", "objective"),
    [("side:gradient", "fc[0]"), ("trunk:gradient", "frozen[sum]"), ("frozen:gradient", "fc[0]")],
)
def test_independent_layers_are_refused(layer: str, objective: str) -> None:
    """A layer that the objective does not depend on gets an error, never zeros."""
    with (
        load("branches") as model,
        pytest.raises(errors.InvalidInputError, match="does not depend on layer"),
    ):
        model.extract(images(), layer, objective=objective)


def test_the_objective_may_be_a_layer_around_the_one_that_is_asked_for() -> None:
    """What is inside a block returns before the block, although the block begins first."""
    block, inside = "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_1.ln_1"
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with layertap.load("gradnets:tiny_vit", item_shape=(3, 32, 32), device="cpu") as model:
        found = model.extract(x, f"{inside}:gradient", objective=f"{block}[norm]")
    seen: list[torch.Tensor] = []
    with with_gradients():
        net = gradnets.tiny_vit()
        for path in (inside, block):
            net.get_submodule(path).register_forward_hook(lambda _, __, value: seen.append(value))
        net(x.clone())
        (expected,) = torch.autograd.grad(seen[1].flatten(1).norm(dim=1).sum(), seen[0])
    assert error(found[f"{inside}:gradient"], expected) <= 1e-5


def test_values_without_gradients_are_refused() -> None:
    """Whole numbers have no gradient; for token ids the error names an embedding."""
    with load("branches") as model:
        with pytest.raises(errors.ExtractorUnsupportedError, match="int64"):
            model.extract(images(), "output.4:gradient", objective="fc[0]")
        with pytest.raises(errors.ExtractorUnsupportedError, match="int64"):
            model.extract(images(), "trunk:gradient", objective="output.4[sum]")
    with (
        load("tokens") as model,
        pytest.raises(errors.InvalidInputError, match="'embed'"),
    ):
        model.extract(torch.ones(1, 6, dtype=torch.int64), "inputs.ids:gradient", objective="[0,0]")


@pytest.mark.parametrize("net", ["batch_norm_then_tokens", "instance_norm_then_tokens"])
def test_norms_of_one_item_have_the_right_gradient(net: str) -> None:
    """PyTorch's own is wrong for one item in some memory layouts; see ``norm_gradients``."""
    x = images(1)
    with load(net) as model:
        found = model.extract(x, ["norm:input_gradient", "conv:gradient"], objective="[2]")
    for name, path in (("norm:input_gradient", "norm"), ("conv:gradient", "conv")):
        gradient = found[name]
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2)).double()

        def at(step: float, path: str = path, direction: torch.Tensor = direction) -> float:
            module = getattr(gradnets, net)().eval()
            moved = step * direction
            if path == "norm":
                module.norm.register_forward_pre_hook(lambda _, given: (given[0] + moved,))
            else:
                module.conv.register_forward_hook(lambda _, __, value: value + moved)
            return float(module(x)[0, 2])

        measured = (at(1e-6) - at(-1e-6)) / 2e-6
        expected = float((gradient * direction).sum())
        assert abs(measured - expected) <= 1e-6 * float(gradient.abs().sum()), name


def test_attention_weights_that_no_layer_uses_have_no_gradient() -> None:
    """An attention module computes them once more for a capture, so nothing depends on them."""
    images = torch.rand(2, 3, 32, 32)
    weights = "encoder.layers.encoder_layer_0.self_attention.attention_weights"
    with layertap.load("gradnets:tiny_vit", item_shape=(3, 32, 32), device="cpu") as model:
        with pytest.raises(errors.ExtractorUnsupportedError, match="not return its attention"):
            model.extract(images, f"{weights}:gradient", objective="[1]")
        found = model.extract(images, "encoder.layers.**:gradient", objective="[1]")
        assert not any("attention_weights" in name for name in found)
        # But they depend on what the module was given, and can be the objective.
        found = model.extract(images, "conv_proj:gradient", objective=f"{weights}[1,2,3]")
    with torch.inference_mode(False), torch.enable_grad():
        net = gradnets.tiny_vit()
        attention = net.encoder.layers[0].self_attention
        kept = []
        attention.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        convolved = []
        net.conv_proj.weight.requires_grad_()
        net.conv_proj.register_forward_hook(lambda *seen: convolved.append(seen[2]))
        net(images.clone())
        _, true = attention(kept[0], kept[0], kept[0], average_attn_weights=False)
        (expected,) = torch.autograd.grad(true[:, 1, 2, 3].sum(), convolved)
    torch.testing.assert_close(found["conv_proj:gradient"], expected, rtol=0, atol=1e-7)


def test_models_that_rely_on_the_memory_of_a_value_are_refused() -> None:
    """Where a copy of a value would change the model's result, there is an error and no number."""
    with load("ignores") as model:
        with pytest.raises(errors.LayertapError):
            model.extract(images(), "relu:gradient", objective="fc[0]")
        with pytest.raises(errors.ExtractorUnsupportedError, match="in place"):
            model.extract(images(), "relu:input_gradient", objective="fc[0]")
        found = model.extract(images(), "conv:gradient", objective="fc[0]")
    with with_gradients():
        net = gradnets.ignores()
        assert isinstance(net, gradnets.Ignores)
        value = net.conv(images().clone()).detach().requires_grad_(True)
        scores = net.fc(value.relu().mean((2, 3)))
        (expected,) = torch.autograd.grad(scores[:, 0].sum(), value)
    assert error(found["conv:gradient"], expected) <= TOLERANCE


def test_the_memory_of_gradients_is_counted_before_the_pass() -> None:
    """A request whose gradients would exceed the server's memory is refused before its pass."""
    limits = layertap.Limits(pending_bytes=1 << 20)
    with load("residual", limits=limits) as model:
        model.extract(images(1), "conv1:gradient", objective="fc[0]")
        with pytest.raises(errors.OverloadedError):
            model.extract(images(256), "conv1:gradient", objective="fc[0]")
        # Nothing is recorded before the first requested layer, so a late one takes little.
        model.extract(images(256), "pool:gradient", objective="fc[0]")


def test_a_pass_ends_at_the_last_layer_that_is_needed(residual: LocalModel) -> None:
    """Modules after the objective's layer don't run, once the plan was tried."""
    residual.extract(images(), "conv1:gradient", objective="conv2[sum]")
    ran: list[str] = []
    module = residual.host.model.module
    handles = [
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in ("conv1", "conv2", "pool", "fc")
    ]
    try:
        residual.extract(images(), "conv1:gradient", objective="conv2[sum]")
    finally:
        for handle in handles:
            handle.remove()
    # The pass ends within the hooks of conv2, before the one of this test.
    assert ran == ["conv1"]
