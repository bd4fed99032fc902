"""A look is a number that model code takes from a tensor that depends on its input."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

import pytest
import torch
from torch import nn

from layertap.extraction.looks import SLACK, unwatched, watch_looks

LOOKS: dict[str, Callable[[torch.Tensor], object]] = {
    "bool": lambda x: bool((x > 2).any()),
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x.sum()),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "the size of a selection": lambda x: len(x[x > 0.5]),
    "what was counted": lambda x: (x.nonzero() + 1).shape[0] > 2,
    "a loop over what was found": lambda x: list(torch.where(x > 0.5)[0] * 2),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "a view": lambda x: float(x[0, 0]),
    "written into another": lambda x: torch.zeros(2, 3).copy_(x).sum().item(),
}
NO_LOOKS: dict[str, Callable[[torch.Tensor], object]] = {
    "shape": lambda x: x.shape[0] > 1 and len(x),
    "computing": lambda x: (x * 2).relu_().sum(),
    "a selection": lambda x: x[x > 0.5].sum(),
    "the size of a constant selection": lambda x: len(x[:, torch.tensor([True, False, True])]),
    "the size of what was reordered": lambda x: len(x[x.argmax(0)]),
    "a constant": lambda x: torch.ones(3).sum().item(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_numbers_of_what_follows_the_input_are_looks(name) -> None:
    """This holds however the number is taken, and whatever operations came before."""
    x = torch.rand(2, 3)
    with watch_looks(nn.Identity(), x) as looks:
        LOOKS[name](x)
    assert looks.count > 0


@pytest.mark.parametrize("name", NO_LOOKS)
def test_shapes_and_constants_are_none(name) -> None:
    """They are the same for every input of the shape, so a trace is right about them."""
    x = torch.rand(2, 3)
    with watch_looks(nn.Identity(), x) as looks:
        NO_LOOKS[name](x)
    assert looks.count == 0


def test_sparse_tensors_can_be_watched() -> None:
    """They have no memory that can be marked; what is computed from them and the input is."""
    x, matrix = torch.rand(3, 3), torch.eye(3).to_sparse()
    with watch_looks(nn.Identity(), x) as looks:
        product = torch.sparse.mm(matrix, x)
        assert looks.count == 0
        assert product.sum().item() > 0
    assert looks.count > 0


def test_marks_of_freed_memory_are_dropped() -> None:
    """Each mark would keep the allocator from joining the freed buffers around it."""
    x = torch.rand(4)
    with watch_looks(nn.Identity(), x) as looks:
        kept = x + 1
        for _ in range(500):
            x = x + 1
        assert len(looks._marked) <= 2 * SLACK
        assert looks.marked(kept)
        assert looks.marked(x)


def test_what_is_unwatched_is_no_look() -> None:
    """When layertap reads a model's state during a watched pass, that is not a look."""
    x = torch.rand(4)
    with watch_looks(nn.Identity(), x) as looks:
        with unwatched():
            bool((x > 0).all())
        assert looks.count == 0
        bool((x > 0).all())
        assert looks.count == 1


def test_a_profiler_goes_on_afterwards() -> None:
    """Users profile models; the profiler sees what comes after a watched pass."""
    net, x = nn.Linear(2, 2), torch.ones(1, 2)
    profile = cProfile.Profile()
    profile.enable()
    try:
        with watch_looks(net, x):
            net(x)
        len(f"{net}")
    finally:
        profile.disable()
    called = {function for _, _, function in pstats.Stats(profile).stats}
    assert "extra_repr" in called
