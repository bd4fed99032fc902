from __future__ import annotations

import re

import pytest
import torch

from layertap.errors import InvalidInputError
from layertap.models import Batch, BatchKey, InputSpec, ItemTensor, Signature

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
    """Any batch size, and any size of the dimensions that may vary, is accepted."""
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
        (InputSpec((1, 16000), free=(1,)), "[B, 1, samples]"),
        (InputSpec((50, 6), free=(0,)), "[B, L, 6]"),
        (InputSpec((4, 4, 4, 4), free=(0, 1, 2, 3)), "[B, N1, N2, N3, N4]"),
    ],
)
def test_pattern_names_what_may_vary(spec: InputSpec, pattern: str) -> None:
    """Dimensions that may vary are letters, the others are numbers."""
    assert spec.pattern == pattern


@pytest.mark.parametrize("free", [(1,), (-1,), (0, 0)])
def test_free_dimensions_are_dimensions_of_the_item(free: tuple[int, ...]) -> None:
    """A free dimension that the item doesn't have, or that occurs twice, is a programming error."""
    with pytest.raises(ValueError, match="free"):
        InputSpec((3,), free=free)


TWO = Signature(
    (
        InputSpec((8,), (0,), torch.int64, name="ids"),
        InputSpec((3, 4, 4), dtype=torch.bfloat16, also=(torch.float32,), name="image"),
    )
)
IDS, IMAGE = ((2, 8), "int64"), ((2, 3, 4, 4), "float32")


def test_a_batch_has_a_tensor_for_each_input() -> None:
    """Any order works, and a free size may differ; the batch size is returned."""
    assert TWO.check({"ids": IDS, "image": IMAGE}) == 2
    assert TWO.check({"image": IMAGE, "ids": ((2, 5), "int64")}) == 2


def test_an_only_input_needs_no_name() -> None:
    """Its own name is accepted too."""
    one = Signature((TWO.inputs[0],))
    assert one.check({"": ((7, 8), "int64")}) == 7
    assert one.check({"ids": ((7, 8), "int64")}) == 7


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"ids": IDS},
            "inputs: got 'ids' without 'image', expected ids [B, sequence], image [B, 3",
        ),
        (
            {"": IDS},
            "inputs: got a tensor without a name, expected a name for each: ids [B, sequence]",
        ),
        (
            {"ids": IDS, "image": IMAGE, "mask": IDS},
            "inputs: got 'mask', expected ids [B, sequence]",
        ),
        ({"ids": IDS, "images": IMAGE}, "inputs: got 'images' (did you mean 'image'?), expected"),
        ({"ids": ((3, 8), "int64"), "image": IMAGE}, "batches of 3 of 'ids', 2 of 'image'"),
        ({"ids": ((2, 8), "int32"), "image": IMAGE}, "input 'ids': got dtype int32"),
        ({"ids": IDS, "image": ((2, 3, 4, 5), "float32")}, "input 'image': got shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(given: dict, text: str) -> None:
    """A missing, unnamed, unknown or misspelt input, unequal batches, a wrong dtype or shape."""
    with pytest.raises(InvalidInputError, match=re.escape(text)):
        TWO.check(given)


def test_an_optional_input_may_be_left_out() -> None:
    """A batch without it has a key without it; a single required tensor needs no name."""
    ids = InputSpec((8,), (0,), torch.int64, name="ids", symbols=("L",))
    mask = InputSpec((8,), (0,), torch.int64, name="mask", symbols=("L",), optional=True)
    signature = Signature((ids, mask))
    assert signature.check({"": ((2, 5), "int64")}) == 2
    assert [item.name for item in signature.key.items] == ["ids"]
    assert [item.name for item in signature.whole_key.items] == ["ids", "mask"]
    assert signature.key_of(Batch({"ids": torch.zeros(1, 8, dtype=torch.int64)})) == signature.key
    assert signature.pattern == "ids [B, L], mask [B, L] (optional)"
    with pytest.raises(InvalidInputError, match="got 'mask' without 'ids'"):
        signature.check({"mask": ((2, 5), "int64")})


def test_dimensions_of_one_name_have_one_size() -> None:
    """A mask whose length differs from that of the ids is refused with the expected length."""
    ids = InputSpec((8,), (0,), torch.int64, name="ids", symbols=("L",))
    mask = InputSpec((8,), (0,), torch.int64, name="mask", symbols=("L",))
    other = InputSpec((8,), (0,), torch.int64, name="other", symbols=("M",))
    signature = Signature((ids, mask, other))
    fits = {"ids": ((2, 5), "int64"), "mask": ((2, 5), "int64"), "other": ((2, 9), "int64")}
    assert signature.check(fits) == 2
    text = "input 'mask': got shape [2, 6] with L 6, expected 5, as 'ids' has"
    with pytest.raises(InvalidInputError, match=re.escape(text)):
        signature.check({**fits, "mask": ((2, 6), "int64")})
    assert [item.shape for item in signature.resized((3,)).items] == [(3,), (3,), (8,)]


def test_the_first_input_is_required() -> None:
    """A signature with no inputs, an optional first input or repeated names is a bug."""
    optional = InputSpec((8,), optional=True)
    for inputs in ((), (optional,), (IMAGES, IMAGES)):
        with pytest.raises(ValueError, match="expected distinct names, the first required"):
            Signature(inputs)


def test_a_key_has_the_models_own_types() -> None:
    """float32 that is converted to bfloat16 is served by the plan for bfloat16."""
    batch = Batch({"image": torch.ones(2, 3, 4, 4), "ids": torch.ones(2, 5, dtype=torch.int64)})
    key = BatchKey(
        (ItemTensor("ids", (5,), torch.int64), ItemTensor("image", (3, 4, 4), torch.bfloat16))
    )
    assert TWO.key_of(batch) == key
    assert TWO.converted(batch).key == key
    assert TWO.key_of(batch) != TWO.key
    assert str(key) == "ids [5] int64, image [3, 4, 4] bfloat16"
