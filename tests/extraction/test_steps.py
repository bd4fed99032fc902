"""A discontinuous step can turn a rounding error of its input into a jump."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from layertap.extraction.looks import watch_looks

Operation = Callable[[torch.Tensor], torch.Tensor]

# Each gets numbers that were computed, and so rounded, of the input.
STEPS: dict[str, Operation] = {
    "topk": lambda x: x.gather(1, x.topk(2).indices),
    "sort": lambda x: x.sort(1).indices,
    "argsort": lambda x: x.argsort(1),
    "argmax": lambda x: functional.one_hot(x.argmax(1), 3).float(),
    "the places of the largest": lambda x: x.max(1).indices,
    "nonzero": lambda x: (x > 0.5).nonzero(),
    "round": torch.round,
    "floor in place": lambda x: x.clone().floor_(),
    "division without a rest": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "remainder": lambda x: x % 0.3,
    "sign": torch.sign,
    "comparison": lambda x: torch.where(x > 0.5, x, 1 - x),
    "a mask": lambda x: x * (x > 0.5),
    "a cast to integers": lambda x: (x * 255).to(torch.uint8).float(),
    "written at computed places": lambda x: torch.zeros(2, 3).scatter_(1, x.argmax(1)[:, None], 1),
    "what is computed of it": lambda x: (x.round() * 3 + 1).exp(),
}
SMOOTH: dict[str, Operation] = {
    "relu": torch.relu,
    "clamp": lambda x: x.clamp(0.2, 0.8),
    "the largest": lambda x: x.max(1).values,
    "the two largest": lambda x: x.topk(2).values,
    "sorted": lambda x: x.sort(1).values,
    "pooling": lambda x: functional.max_pool1d(x[None], 2),
    "zeros of its shape": lambda x: x + torch.zeros_like(x, dtype=torch.bool),
    "whether it is finite": lambda x: torch.where(x.isfinite(), x, torch.zeros_like(x)),
    "softmax": lambda x: x.softmax(1),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
}
MODES = [torch.no_grad, torch.inference_mode]


def step_of(operation: Operation, x: torch.Tensor) -> str:
    with watch_looks(nn.Identity(), x) as looks:
        return looks.step(operation(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_computed_numbers_are_seen(name, mode) -> None:
    """Whatever depends on a step is marked, however the operations are split."""
    with mode():
        assert step_of(lambda x: STEPS[name](x @ torch.rand(3, 3)), torch.rand(2, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SMOOTH)
def test_operations_that_move_as_little_as_their_argument_are_no_steps(name, mode) -> None:
    """A rounding error remains a rounding error."""
    with mode():
        assert not step_of(lambda x: SMOOTH[name](x @ torch.rand(3, 3)), torch.rand(2, 3))


@pytest.mark.parametrize("name", ["comparison", "argmax", "sort"])
def test_steps_of_the_input_itself_are_exact(name) -> None:
    """The input's own numbers are not rounded, so a mask of them is the same in every program."""
    assert not step_of(STEPS[name], torch.rand(2, 3))
    assert not step_of(lambda x: STEPS[name](x.flip(1).relu()), torch.rand(2, 3))


def test_token_ids_may_be_compared_and_picked_by() -> None:
    """Masks of ids and rows of an embedding depend on exact numbers."""
    table = torch.rand(9, 4)

    def embed(ids: torch.Tensor) -> torch.Tensor:
        rows = functional.embedding(torch.where(ids == 3, 0, ids), table)
        return rows @ torch.rand(4, 4) * (ids > 0)[..., None]

    assert not step_of(embed, torch.randint(0, 9, (2, 5)))


def test_the_step_is_named() -> None:
    """A refusal can name the operation."""
    assert step_of(lambda x: (x @ torch.rand(3, 3)).argmax(1) + 1, torch.rand(2, 3)) == "argmax"
