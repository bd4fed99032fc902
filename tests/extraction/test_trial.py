from __future__ import annotations

import pytest
import torch

import inputnets
from batches import batch_for
from layertap.errors import ModelLoadError
from layertap.extraction.trial import tried
from layertap.models import LoadedModel, ModelSpec, load_model


def trial(net: str, item_shape: tuple[int, ...], **declared: object) -> LoadedModel:
    return tried(load_model(ModelSpec(f"inputnets:{net}", item_shape=item_shape, **declared)))


@pytest.mark.parametrize(
    ("net", "item_shape", "dtype", "free"),
    [
        ("wave", (64,), torch.float32, (0,)),
        ("text", (16,), torch.int64, (0,)),
        ("rounds_ids", (16,), torch.int64, (0,)),
        ("tabular", (3,), torch.float32, (0,)),
        ("series", (10, 6), torch.float32, (0,)),
        ("squares", (3, 16, 16), torch.float32, (1, 2)),
        ("flattened", (3, 16, 16), torch.float32, ()),
        ("divisible", (3, 32, 16), torch.float32, (1, 2)),
        ("double", (4,), torch.float64, ()),
        ("force", (5, 3), torch.float32, (0,)),
    ],
)
def test_the_input_is_found_by_trying(
    net: str, item_shape: tuple[int, ...], dtype: torch.dtype, free: tuple[int, ...]
) -> None:
    """The dtype and the free dimensions are those with which the model runs."""
    found = trial(net, item_shape).signature.main
    assert (found.dtype, found.free, found.guess) == (dtype, free, None)


def test_what_is_declared_is_not_tried() -> None:
    """A declared dtype and declared free dimensions are used unchanged."""
    found = trial("rounds_ids", (16,), input_dtype="int32", free_dims=()).signature.main
    assert (found.dtype, found.free) == (torch.int32, ())


def test_a_declared_type_that_fails_is_refused() -> None:
    """The message names the dtype and has the model's error."""
    with pytest.raises(
        ModelLoadError,
        match=r"'text' fails on random input of item shape \[16\]: float32: RuntimeError: .*ndices",
    ):
        trial("text", (16,), input_dtype="float32")


def test_a_model_that_takes_nothing_is_refused() -> None:
    """The message has each dtype that was tried."""
    with pytest.raises(ModelLoadError, match="float32: .*int64: .*uint8: "):
        trial("flattened", (3, 16, 17))


@pytest.mark.parametrize("net", ["force", "quiet_force"])
def test_a_model_that_differentiates_runs_under_no_grad(net: str) -> None:
    """Its values are those of a fresh module under no_grad, even inside inference mode."""
    model = trial(net, (5, 3))
    x = torch.rand(2, 5, 3)
    value = model.forward(batch_for(model, x))
    with torch.inference_mode(mode=False), torch.no_grad():
        right = getattr(inputnets, net)()(x.clone())
    assert model.differentiates
    assert torch.equal(value, right)
    assert value.abs().max() > 0
    assert not trial("wave", (64,)).differentiates


def test_a_model_is_left_as_it_was() -> None:
    """What a trial's passes write to attributes, lists and buffers is restored."""
    net = trial("remembers", (64,)).module
    assert (net.passes, net.seen, net.count.item()) == (0, [], 0)
