from __future__ import annotations

import pytest
import torch

from layertap.errors import InvalidInputError
from layertap.models import InputSpec

IMAGES = InputSpec((3, 224, 224), free=(1, 2))
FIXED = InputSpec((3, 224, 224))
VIDEO = InputSpec((3, 16, 112, 112), free=(1, 2, 3))
TOKENS = InputSpec((8,), dtype=torch.int64)
SERIES = InputSpec((50, 6), free=(0,))


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        (IMAGES, (1, 3, 224, 224), "float32"),
        (IMAGES, (7, 3, 1, 500), "float32"),
        (FIXED, (2, 3, 224, 224), "float32"),
        (VIDEO, (1, 3, 4, 64, 48), "float32"),
        (TOKENS, (5, 8), "int64"),
        (SERIES, (2, 7, 6), "float32"),
    ],
)
def test_right_inputs_pass(spec: InputSpec, shape: tuple[int, ...], dtype: str) -> None:
    """Any batch, and any size of the dimensions that may vary, is accepted."""
    spec.check(shape, dtype)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (IMAGES, ()),
        (IMAGES, (3, 224, 224)),
        (IMAGES, (1, 1, 3, 224, 224)),
        (IMAGES, (1, 224, 224, 3)),
        (IMAGES, (0, 3, 224, 224)),
        (IMAGES, (1, 3, 0, 224)),
        (FIXED, (1, 3, 224, 225)),
        (VIDEO, (1, 3, 112, 112)),
        (TOKENS, (1, 9)),
        (SERIES, (1, 50, 7)),
        (SERIES, (1, 50)),
    ],
)
def test_wrong_shapes_are_refused(spec: InputSpec, shape: tuple[int, ...]) -> None:
    """A wrong rank, a wrong fixed size, an empty batch and a zero size are refused."""
    with pytest.raises(InvalidInputError, match=r"input 'input': got shape \["):
        spec.check(shape, spec.dtype_name)


def test_the_message_names_field_got_and_expected() -> None:
    """The message quotes the shape, the pattern and an example."""
    with pytest.raises(InvalidInputError) as caught:
        IMAGES.check((224, 224, 3), "float32")

    assert str(caught.value) == (
        "input 'input': got shape [224, 224, 3], expected [B, 3, H, W] (batch first, no size "
        "zero), such as [1, 3, 224, 224]"
    )


def test_a_wrong_dtype_is_refused() -> None:
    """A dtype is never converted silently."""
    with pytest.raises(InvalidInputError, match="input 'input': got dtype uint8, expected float32"):
        IMAGES.check((1, 3, 224, 224), "uint8")


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (IMAGES, "[B, 3, H, W]"),
        (FIXED, "[B, 3, 224, 224]"),
        (VIDEO, "[B, 3, T, H, W]"),
        (InputSpec((1, 16000), free=(1,)), "[B, 1, L]"),
        (InputSpec((50, 6), free=(0,)), "[B, L, 6]"),
        (InputSpec((4, 4, 4, 4), free=(0, 1, 2, 3)), "[B, N1, N2, N3, N4]"),
    ],
)
def test_pattern_names_what_may_vary(spec: InputSpec, pattern: str) -> None:
    """Dimensions that may vary are letters, the others numbers."""
    assert spec.pattern == pattern


@pytest.mark.parametrize("free", [(1,), (-1,), (0, 0)])
def test_free_dimensions_are_dimensions_of_the_item(free: tuple[int, ...]) -> None:
    """A free dimension that the item doesn't have, or that stands twice, is a programming error."""
    with pytest.raises(ValueError, match="free"):
        InputSpec((3,), free=free)
