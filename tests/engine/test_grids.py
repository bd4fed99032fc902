"""Grids of another size, concatenated layers and projections, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import asking
import tinynets
from kept import kept
from layertap import (
    Extractor,
    Features,
    Intervention,
    LayerSelection,
    Projection,
    Reduction,
    Regrid,
    errors,
)
from layertap.engine import Call, Engine, Extraction, HostOptions, Limits
from layertap.engine.making import Made, Making
from layertap.extraction.points import Dim, ValueSpec
from layertap.extraction.projecting import Matrix, projected
from layertap.extraction.reductions import Reduced
from layertap.local import load
from layertap.models import ModelSpec
from layertap.settings import BatchPolicy
from oracle import outputs_of
from together import Together

WIDE = (3, 16, 24)
LIMITS = Limits(reply_bytes=64 << 20, pending_bytes=128 << 20)
LAYOUTS = ["tokens", "bare", "last", "patch"]
"""One grid [B, 6, 4, 6] as patch tokens with and without others, channels last, channels first."""
X = torch.randn(3, *WIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a small ViT, a small ResNet and a net of texts' shape."""
    engine = Engine(LIMITS, plan_cache=kept())
    for net in ("patches", "residual"):
        engine.load(ModelSpec(f"tinynets:{net}", item_shape=WIDE))
    yield engine
    assert engine.pending_bytes == 0
    engine.close()


def ask(engine: Engine, net: str, *layers: str | LayerSelection, x: torch.Tensor = X) -> Features:
    return asking.ask(engine, net, list(layers), x, Extractor.HOOK)


def raw(net: str, *layers: str, x: torch.Tensor = X) -> list[torch.Tensor]:
    """Return what a fresh module's layers return."""
    module = {"patches": tinynets.patches, "residual": tinynets.residual}[net]()
    return [outputs_of(module, x, layer)[0] for layer in layers]


@pytest.mark.parametrize("layer", LAYOUTS)
def test_grids_of_every_layout(engine: Engine, layer: str) -> None:
    """Whatever the layout is, the bits are those of PyTorch's functions on the grid."""
    [grid] = raw("patches", "patch")
    found = ask(
        engine, "patches",
        f"{layer}:pool=2x3=pooled", f"{layer}:resize=9x5=large", f"{layer}:around=3=around",
        f"{layer}:around=3:resize=9x5=both", f"{layer}:pool=1x1:reduce=flatten=flat",
    )  # fmt: skip
    near = functional.avg_pool2d(grid, 3, 1, 1)
    expected = {
        "pooled": functional.adaptive_avg_pool2d(grid, (2, 3)),
        "large": functional.interpolate(grid, (9, 5), mode="bilinear", align_corners=False),
        "around": near,
        "both": functional.interpolate(near, (9, 5), mode="bilinear", align_corners=False),
        "flat": functional.adaptive_avg_pool2d(grid, 1).flatten(1),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name], value.numpy()), name


def test_layers_become_one_tensor(engine: Engine) -> None:
    """The channels follow one another in the order of the names, on the first layer's grid."""
    one, two = raw("residual", "layer1", "layer2")
    small = functional.interpolate(one, two.shape[2:], mode="bilinear", align_corners=False)
    large = functional.interpolate(two, one.shape[2:], mode="bilinear", align_corners=False)
    pooled = [functional.adaptive_avg_pool2d(each, (2, 2)) for each in (one, two)]
    found = ask(
        engine, "residual",
        "layer1+layer2", "layer2+layer1=turned", "layer1+layer2:pool=2x2=pooled",
        "layer1+layer2:reduce=global_average_pool=vector", "layer1+layer1=twice", "layer2",
    )  # fmt: skip
    expected = {
        "layer1+layer2": torch.cat([one, large], 1),
        "turned": torch.cat([two, small], 1),
        "pooled": torch.cat(pooled, 1),
        "vector": torch.cat([one.flatten(2).mean(2), two.flatten(2).mean(2)], 1),
        "twice": torch.cat([one, one], 1),
        "layer2": two,
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name], value.numpy()), name


def test_a_part_is_the_value_at_its_moment(engine: Engine) -> None:
    """A later in-place operation does not change a part that waits for the other layers."""
    bn, after = raw("residual", "bn1", "layer2")
    assert bn.min() < 0 <= torch.relu(bn).min()
    [value] = ask(engine, "residual", "bn1+layer2").values()
    assert np.array_equal(value[:, : bn.shape[1]], bn.numpy())
    assert value.shape[1] == bn.shape[1] + after.shape[1]


PROJECTION = Projection(
    np.random.default_rng(1).standard_normal((4, 6), np.float32),
    np.random.default_rng(2).standard_normal(6, np.float32),
)


@pytest.mark.parametrize("layer", LAYOUTS)
def test_projections_of_every_layout(engine: Engine, layer: str) -> None:
    """Channels are multiplied where they are; the grid and the tokens stay in their places."""
    [value] = raw("patches", layer)
    axis = 1 if layer == "patch" else -1
    centred = value.double().movedim(axis, -1) - torch.from_numpy(PROJECTION.mean).double()
    product = centred @ torch.from_numpy(PROJECTION.matrix).double().T
    [found] = ask(engine, "patches", LayerSelection(layer, projection=PROJECTION)).values()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, product.movedim(-1, axis).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYOUTS)
def test_projections_of_a_grid(engine: Engine, layer: str) -> None:
    """The grid that a reduction makes has its channels in front."""
    [value] = raw("patches", "patch")
    centred = value.movedim(1, -1).double() - torch.from_numpy(PROJECTION.mean).double()
    product = centred @ torch.from_numpy(PROJECTION.matrix).double().T
    selection = LayerSelection(layer, reduction=Reduction.TOKEN_GRID, projection=PROJECTION)
    [found] = ask(engine, "patches", selection).values()
    np.testing.assert_allclose(found, product.movedim(-1, 1).numpy(), rtol=1e-4, atol=1e-5)


def test_a_projection_comes_after_everything_else(engine: Engine) -> None:
    """It takes the channels of all layers together, after their reduction."""
    one, two = raw("residual", "layer1", "layer2")
    matrix = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    selection = LayerSelection(
        "layer1", concat=("layer2",), reduction=Reduction.GLOBAL_AVERAGE_POOL,
        projection=Projection(matrix.numpy()), dtype="float16", alias="vector",
    )  # fmt: skip
    grids = LayerSelection(
        "layer1", concat=("layer2",), regrid=Regrid(around=3), projection=Projection(matrix.numpy())
    )
    found = ask(engine, "residual", selection, grids)
    means = torch.cat([one.mean((2, 3)), two.mean((2, 3))], 1)
    assert found["vector"].dtype == np.float16
    np.testing.assert_allclose(
        found["vector"], (means.double() @ matrix.T).numpy(), rtol=2e-3, atol=2e-3
    )
    near = [functional.avg_pool2d(each, 3, 1, 1) for each in (one, two)]
    near[1] = functional.interpolate(near[1], one.shape[2:], mode="bilinear", align_corners=False)
    places = torch.cat(near, 1).double()
    np.testing.assert_allclose(
        found["layer1+layer2"], torch.einsum("kc,bchw->bkhw", matrix, places).numpy(), atol=1e-5
    )


def test_the_same_by_a_compiled_program(engine: Engine) -> None:
    """An extractor that folds batch norms gives the same values within its tolerance."""
    layers = ["layer1+layer2:around=3"]
    expected = asking.ask(engine, "residual", layers, X, Extractor.HOOK)["layer1+layer2"]
    found = asking.ask(engine, "residual", layers, X, Extractor.TORCHSCRIPT)["layer1+layer2"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_each_request_of_a_shared_pass_has_its_own_matrix() -> None:
    """Requests that share a pass have equal layers, but not the projections of one another."""
    engine = Engine(plan_cache=kept())
    options = HostOptions(batching=BatchPolicy(max_size=16))
    engine.load(ModelSpec("tinynets:chain", item_shape=tinynets.ITEM), options=options)
    xs = [torch.rand(1 + number, *tinynets.ITEM) for number in range(4)]

    def expected(number: int) -> torch.Tensor:
        one, two = (outputs_of(tinynets.chain(), xs[number], f"layer{n}")[0] for n in (1, 2))
        large = functional.interpolate(two, one.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([one, large], 1)[:, number + 6]

    def one(number: int) -> Extraction:
        matrix = np.zeros((1, 24), np.float32)
        matrix[0, number + 6] = 1
        selection = LayerSelection("layer1", concat=("layer2",), projection=Projection(matrix))
        request = asking.request_for("chain", [selection], xs[number], Extractor.HOOK)
        return engine.extract(request, Call())

    asked = [partial(one, number) for number in range(4)]
    for ask in asked:
        ask()  # So that every plan is there already.
    Together(engine, asked)  # The first batch proves that passes may be shared.
    together = Together(engine, asked)
    assert together.shared == [4, 4, 4, 4]
    for number, values in enumerate(together.values()):
        found = values["layer1+layer2"][:, 0]
        np.testing.assert_allclose(found, expected(number).numpy(), atol=1e-5)
    engine.close()


def test_sets_of_interventions() -> None:
    """Each set of changes has its own part of the tensor, as without a concatenation."""
    texts = ("layer1:channel=3:zero", "layer2:scale=2")
    changes = [
        replace(Intervention.parse(text), set=number) for number, text in enumerate(texts, 1)
    ]
    with load("tinynets:residual", item_shape=WIDE, device="cpu") as model:
        both = [
            model.extract(X, layers, interventions=changes, extractor="hook").numpy()
            for layers in (["layer1+layer2"], ["layer1", "layer2:resize=8x12"])
        ]
    together, apart = both
    whole = np.concatenate([apart["layer1"], apart["layer2"]], 1)
    assert np.array_equal(together["layer1+layer2"], whole)
    assert not np.array_equal(whole[:3], whole[3:])


def test_a_pass_that_runs_again_replaces_what_it_left() -> None:
    """Values of a pass that failed are not mixed with those of the next one."""
    spec = ValueSpec(torch.float32, (Dim(1, batch=True), Dim(1)))
    whole = ValueSpec(torch.float32, (Dim(1, batch=True), Dim(2)))
    same = Reduced(spec, lambda value: value)
    making = Making([Made([same, same], whole)], 1)
    values = [torch.full((1, 1), float(number)) for number in range(4)]
    assert making.take(0, 0, values[0]) is None  # This pass fails here.
    assert making.take(0, 0, values[1]) is None
    assert torch.equal(making.take(0, 1, values[2]), torch.tensor([[1.0, 2.0]]))
    assert making.take(0, 1, values[3]) is None  # A complete tensor is started again.
    assert torch.equal(making.take(0, 0, values[0]), torch.tensor([[0.0, 3.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_a_projection(dtype: torch.dtype) -> None:
    """The product of half precision is not rounded to it; float64 stays float64."""
    value = torch.randn(2, 300, generator=torch.Generator().manual_seed(3)).to(dtype)
    matrix = np.random.default_rng(0).standard_normal((2, 300))
    spec = ValueSpec(dtype, (Dim(1, batch=True), Dim(300)))
    made = projected(spec, Matrix.of(Projection(matrix)), "layer")
    expected = value.double().numpy() @ matrix.T
    found = made.apply(value)
    assert found.dtype is made.spec.dtype is torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-5)


NAN = np.full((1, 16), np.nan, np.float32)
HUGE = np.zeros((8192, 8 << 10), np.float32)

REFUSED = {
    "no grid": ("residual", "fc:pool=2x2", r"AVERAGE_POOL to \[2, 2\] takes patch tokens.*'fc'"),
    "no grid for neighbours": ("residual", "fc:around=3", r"around: 3 takes .*'fc'"),
    "a grid and a vector": ("residual", "layer1+fc", r"concat takes .*'fc'"),
    "an unknown layout": ("patches", "tokens+patch:reduce=class_token", r"CLASS_TOKEN.*'patch'"),
    "an even square": ("residual", "layer1:around=2", "around: got 2, expected an odd number"),
    "a large square": ("residual", "layer1:around=33", "around: got 33"),
    "no number": ("residual", "layer1:around=x", "around: got 'x'"),
    "no size": ("residual", "layer1:pool=7", "pool: got '7', expected HEIGHTxWIDTH"),
    "an empty size": ("residual", "layer1:pool=0x4", r"size: got \[0, 4\]"),
    "a large size": ("residual", "layer1:resize=5000x4", r"size: got \[5000, 4\]"),
    "two sizes": ("residual", "layer1:resize=4x4:pool=4x4", "expected one of them"),
    "a large grid": ("residual", "layer1:resize=4096x4096", "reply: .* predicted, limit"),
    "a large whole": (
        "residual",
        LayerSelection(
            "layer1",
            regrid=Regrid(size=(4096, 4096)),
            projection=Projection(np.zeros((1, 8), np.float32)),
        ),
        "reply: .* bytes of values before they are projected",
    ),
    "a glob": ("residual", "layer1+layer*", "concat: got the glob 'layer\\*'"),
    "a layer that is not there": ("residual", "layer1+layer9", "layer9"),
    "an empty name": ("residual", "layer1+", r"layer: got 'layer1\+'"),
    "a map": ("residual", "layer1+layer2:eigen_cam", "concat: got EIGEN_CAM"),
    "another number of channels": (
        "residual",
        LayerSelection("layer1", projection=Projection(np.ones((1, 9), np.float32))),
        r"got \[1, 9\], expected \[K, 8\], as 'layer1' has 8 channels",
    ),
    "a huge matrix": (
        "residual",
        LayerSelection("layer1", projection=Projection(HUGE)),
        "memory: the request takes .* the limit is",
    ),
    "a file": ("residual", "layer1:project=@pca.npz", "project: got '@pca.npz'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(engine: Engine, name: str) -> None:
    """The error says what was expected; nothing is computed and nothing stays reserved."""
    net, selection, message = REFUSED[name]
    catalogue = engine.host(net).catalogue
    names = selection.layers if isinstance(selection, LayerSelection) else _split(selection)
    if all(layer in catalogue.entries for layer in names):
        ask(engine, net, *names)  # So that no pass proves the plan below.
    computed: list[int] = []
    module = engine.host(net).model.module
    hook = module.register_forward_pre_hook(lambda m, a: computed.append(1))
    try:
        with pytest.raises(errors.LayertapError, match=message):
            ask(engine, net, selection)
    finally:
        hook.remove()
    assert not computed
    assert engine.pending_bytes == 0


def _split(text: str) -> list[str]:
    return text.partition(":")[0].split("+")


@pytest.mark.parametrize(
    ("matrix", "mean", "message"),
    [
        (NAN, None, "matrix: got NaN or infinity"),
        (np.ones(4, np.float32), None, r"matrix: got the shape \[4\], expected \[K, C\]"),
        (np.ones((0, 4), np.float32), None, r"matrix: got the shape \[0, 4\]"),
        (np.ones((2, 4), np.int64), None, "matrix: got int64"),
        (np.ones((2, 4), np.float32), np.ones(3, np.float32), r"mean: got the shape \[3\]"),
        (np.ones((2, 4), np.float32), np.full(4, np.inf), "mean: got NaN or infinity"),
    ],
)
def test_matrices_that_are_refused(matrix: Any, mean: Any, message: str) -> None:
    """A projection checks its numbers before anything is sent."""
    with pytest.raises(errors.InvalidInputError, match=message):
        Projection(matrix, mean)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"around": 3.0}, "around: got 3.0"),
        ({"around": 0}, "around: got 0"),
        ({"size": (2.5, 3)}, r"size: got \[2.5, 3\]"),
        ({"size": (2,)}, r"size: got \[2\]"),
        ({"size": (2, 3), "resize": "nearest"}, "resize: got 'nearest', expected one of bilinear"),
    ],
)
def test_grids_that_are_refused(given: dict[str, Any], message: str) -> None:
    """A grid checks its numbers before anything is sent; NumPy's are numbers too."""
    with pytest.raises(errors.InvalidInputError, match=message):
        Regrid(**given)
    assert Regrid(size=np.array([2, 3])) == Regrid(size=(2, 3))


def test_files_of_projections(tmp_path) -> None:
    """An .npy file is a matrix; an .npz file has scikit-learn's names or ours."""
    matrix, mean = np.ones((2, 3)), np.arange(3.0)
    np.save(tmp_path / "m.npy", matrix)
    np.savez(tmp_path / "ours.npz", matrix=matrix, mean=mean)
    np.savez(tmp_path / "theirs.npz", components_=matrix, mean_=mean)
    np.savez(tmp_path / "none.npz", mean=mean)
    (tmp_path / "broken.npz").write_bytes(b"x")
    assert Projection.load(str(tmp_path / "m.npy")).mean is None
    for name in ("ours.npz", "theirs.npz"):
        read = Projection.load(str(tmp_path / name))
        assert np.array_equal(read.matrix, matrix)
        assert np.array_equal(read.mean, mean)
    for name in ("none.npz", "broken.npz", "missing.npz"):
        with pytest.raises(errors.InvalidInputError, match=name):
            Projection.load(str(tmp_path / name))
