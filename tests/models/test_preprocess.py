from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision import models

from layertap.errors import InvalidInputError
from layertap.models import Preprocess


def of(builder: str) -> Preprocess:
    """Return the preprocessing of a builder's default weights."""
    return Preprocess(models.get_model_weights(builder).DEFAULT.transforms())


@pytest.mark.parametrize("builder", ["resnet18", "inception_v3", "fcn_resnet50", "ssd300_vgg16"])
def test_equals_the_weights_own_transforms(builder: str, photo: Image.Image) -> None:
    """A photograph becomes bit for bit what torchvision's transforms make of it."""
    expected = models.get_model_weights(builder).DEFAULT.transforms()(photo)

    got = of(builder)(photo)

    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        (
            "resnet18",
            "resize 256 (bilinear, antialias), center crop 224, rescale to [0, 1], "
            "normalize mean [0.485, 0.456, 0.406] std [0.229, 0.224, 0.225]",
        ),
        (
            "swin_t",
            "resize 232 (bicubic, antialias), center crop 224, rescale to [0, 1], "
            "normalize mean [0.485, 0.456, 0.406] std [0.229, 0.224, 0.225]",
        ),
        (
            "fcn_resnet50",
            "resize 520 (bilinear, antialias), rescale to [0, 1], "
            "normalize mean [0.485, 0.456, 0.406] std [0.229, 0.224, 0.225]",
        ),
        ("ssd300_vgg16", "rescale to [0, 1]"),
    ],
)
def test_describe_says_what_is_done(builder: str, words: str) -> None:
    """The description lists the steps in order with their numbers."""
    assert of(builder).describe() == words


def test_a_batch_is_its_items_stacked(photo: Image.Image) -> None:
    """Images of different sizes make one batch where the preprocessing crops."""
    narrow = photo.resize((100, 300))
    preprocess = of("resnet18")

    batch = preprocess.batch([preprocess.shrink(photo), preprocess.shrink(narrow)])

    assert batch.shape == (2, 3, 224, 224)
    assert torch.equal(batch[1], preprocess(narrow))


def test_most_of_the_work_needs_no_pytorch(photo: Image.Image) -> None:
    """Shrinking makes an image of the model's size, and the rest makes the same tensor of it."""
    preprocess = of("resnet18")

    shrunk = preprocess.shrink(photo)

    assert shrunk.size == (224, 224)
    assert torch.equal(preprocess.batch([shrunk])[0], preprocess(photo))


def test_a_transform_of_unknown_steps_is_left_whole(photo: Image.Image) -> None:
    """What can't be cut in two runs as it is, after the shrinking that is none."""
    transform = models.get_model_weights("fcn_resnet50").DEFAULT.transforms()
    preprocess = Preprocess(transform)

    shrunk = preprocess.shrink(photo)

    assert shrunk is photo
    assert torch.equal(preprocess.batch([shrunk])[0], transform(photo))


def test_sizes_must_agree_where_nothing_crops(photo: Image.Image) -> None:
    """Images that come out in different sizes can't be a batch; the message has both sizes."""
    with pytest.raises(InvalidInputError) as caught:
        of("ssd300_vgg16").batch([photo.resize((40, 30)), photo.resize((40, 31))])

    assert "images[1]: got 40 x 31 pixels after preprocessing, expected 40 x 30 pixels" in str(
        caught.value
    )


def test_an_empty_batch_is_refused() -> None:
    """A batch has at least one image."""
    with pytest.raises(InvalidInputError, match="images: got none"):
        of("resnet18").batch([])


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
def test_extreme_proportions_are_refused(size: tuple[int, int]) -> None:
    """A sliver isn't blown up to hundreds of millions of pixels by resizing its short side."""
    with pytest.raises(InvalidInputError, match=f"images: got {size[0]} x {size[1]} pixels"):
        of("resnet18")(Image.new("RGB", size))


def test_slivers_pass_where_nothing_resizes() -> None:
    """Without a resize no image grows, so its proportions don't matter."""
    assert of("ssd300_vgg16")(Image.new("RGB", (1, 10_000))).shape == (3, 10_000, 1)
