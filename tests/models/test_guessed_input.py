from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models import InputSpec, ModelSpec
from layertap.models.guessed_input import guess_input

SPEC = ModelSpec("pkg:net")


@pytest.mark.parametrize(
    ("net", "channels"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), 3),
        (nn.Conv2d(6, 6, 3, groups=3), 6),
    ],
)
def test_a_convolution_first_means_images(net: nn.Module, channels: int) -> None:
    """Images of any size, with the channels of the first convolution, are the guess."""
    assert guess_input(net, SPEC) == InputSpec((channels, 224, 224), 2)


def test_a_scripted_convolution_is_seen_too() -> None:
    """In TorchScript the kind of a module is its original name."""
    with warnings.catch_warnings():
        # Torch deprecates TorchScript.
        warnings.simplefilter("ignore")
        net = torch.jit.script(nn.Sequential(nn.Conv2d(1, 4, 3)))

    assert guess_input(net, SPEC) == InputSpec((1, 224, 224), 2)


@pytest.mark.parametrize("net", [nn.Linear(4, 2), nn.ReLU(), nn.Conv1d(1, 1, 1)])
def test_anything_else_needs_an_item_shape(net: nn.Module) -> None:
    """Where the input can't be told, the message asks for it."""
    with pytest.raises(ModelLoadError, match=r"item shape of net.*--item-shape"):
        guess_input(net, SPEC)


@pytest.mark.parametrize(
    ("net", "item_shape", "expected"),
    [
        (nn.Linear(4, 2), (4,), InputSpec((4,), 0)),
        (nn.Conv1d(1, 1, 1), (1, 16000), InputSpec((1, 16000), 1)),
        (nn.Conv2d(3, 1, 1), (3, 8, 9), InputSpec((3, 8, 9), 2)),
        (nn.Conv3d(3, 1, 1), (3, 4, 8, 8), InputSpec((3, 4, 8, 8), 3)),
        (nn.Embedding(9, 4), (12,), InputSpec((12,), 0, torch.int64)),
        (nn.Conv2d(3, 1, 1).half(), (3, 8, 8), InputSpec((3, 8, 8), 2, torch.float16)),
        (nn.ReLU(), (3, 8, 8), InputSpec((3, 8, 8), 2)),
    ],
)
def test_an_item_shape_is_taken(
    net: nn.Module, item_shape: tuple[int, ...], expected: InputSpec
) -> None:
    """The user's shape is taken, sizes after the first may vary, the dtype is the module's."""
    assert guess_input(net, ModelSpec("pkg:net", item_shape=item_shape)) == expected
