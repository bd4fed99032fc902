from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models import InputGuess, InputSpec, ModelSpec
from layertap.models.guessed_input import guess_input

SPEC = ModelSpec("pkg:net")


def known(spec: InputSpec) -> tuple[object, ...]:
    return spec.shape, spec.free, spec.dtype


@pytest.mark.parametrize(
    ("net", "channels"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), 3),
        (nn.Conv2d(6, 6, 3, groups=3), 6),
    ],
)
def test_a_convolution_first_means_images(net: nn.Module, channels: int) -> None:
    """The guess is images of any size, with the channels of the first convolution."""
    spec = guess_input(net, SPEC)
    assert known(spec) == ((channels, 224, 224), (1, 2), torch.float32)
    assert spec.guess is not None
    assert spec.guess.free


def test_a_scripted_convolution_is_seen_too() -> None:
    """In TorchScript a module's kind is its original name."""
    with warnings.catch_warnings():
        # Torch deprecates TorchScript.
        warnings.simplefilter("ignore")
        net = torch.jit.script(nn.Sequential(nn.Conv2d(1, 4, 3)))

    assert known(guess_input(net, SPEC)) == ((1, 224, 224), (1, 2), torch.float32)


@pytest.mark.parametrize("net", [nn.Linear(4, 2), nn.ReLU(), nn.Conv1d(1, 1, 1)])
def test_anything_else_needs_an_item_shape(net: nn.Module) -> None:
    """If the input can't be determined, the message asks for it."""
    with pytest.raises(ModelLoadError, match=r"item shape of net.*--item-shape"):
        guess_input(net, SPEC)


@pytest.mark.parametrize(
    ("net", "item_shape", "expected"),
    [
        (nn.Linear(4, 2), (4,), InputSpec((4,))),
        (nn.Conv1d(1, 1, 1), (1, 16000), InputSpec((1, 16000), (1,))),
        (nn.Conv2d(3, 1, 1), (3, 8, 9), InputSpec((3, 8, 9), (1, 2))),
        (nn.Conv3d(3, 1, 1), (3, 4, 8, 8), InputSpec((3, 4, 8, 8), (1, 2, 3))),
        (nn.Embedding(9, 4), (12,), InputSpec((12,), dtype=torch.int64)),
        (nn.Conv2d(3, 1, 1).half(), (3, 8, 8), InputSpec((3, 8, 8), (1, 2), torch.float16)),
        (nn.ReLU(), (3, 8, 8), InputSpec((3, 8, 8), (1, 2))),
    ],
)
def test_an_item_shape_is_taken(
    net: nn.Module, item_shape: tuple[int, ...], expected: InputSpec
) -> None:
    """The user's shape is used, sizes after the first may vary, the dtype is the module's."""
    guessed = guess_input(net, ModelSpec("pkg:net", item_shape=item_shape))
    assert known(guessed) == known(expected)


def test_the_guesses_are_marked() -> None:
    """Other dtypes to try are listed; the first of them is the weights' own."""
    spec = guess_input(nn.Embedding(9, 4).half(), ModelSpec("pkg:net", item_shape=(5,)))
    assert spec.guess is not None
    assert spec.guess.dtypes[:2] == (torch.float16, torch.float32)
    assert torch.int64 not in spec.guess.dtypes


def test_what_is_declared_is_no_guess() -> None:
    """The declared dtype and free dimensions are used, and nothing else is tried."""
    declared = ModelSpec("pkg:net", item_shape=(3, 8, 9), input_dtype="uint8", free_dims=(2,))
    spec = guess_input(nn.Conv2d(3, 1, 1), declared)
    assert spec == InputSpec((3, 8, 9), (2,), torch.uint8, guess=InputGuess())


def test_free_dimensions_are_dimensions_of_the_item() -> None:
    """An index after the item's last dimension is refused, with the valid ones."""
    declared = ModelSpec("pkg:net", item_shape=(3, 8, 9), free_dims=(1, 3))
    with pytest.raises(ModelLoadError, match=r"free dimensions of net: got \[1, 3\].*0 to 2"):
        guess_input(nn.Conv2d(3, 1, 1), declared)
