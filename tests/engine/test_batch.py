"""A request's images take no more memory than allowed, however small their files are."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from kept import kept
from layertap import LayerSelection, errors
from layertap.engine import Call, Engine, ExtractionRequest, ImageFiles, Inputs, Limits
from layertap.engine.batch import KEPT_IMAGES
from layertap.models import ImageSettings, ModelSpec
from layertap.services.native_form import NativeForm
from tinynets import ITEM

PIXELS = 1000
# Each is cropped to the item's size.
MOST = PIXELS * KEPT_IMAGES // (ITEM[1] * ITEM[2])


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that takes images of 1,000 pixels."""
    engine = Engine(Limits(pixels=PIXELS), plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    yield engine
    engine.close()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(engine: Engine, *images: bytes) -> int:
    request = ExtractionRequest(
        "residual",
        Inputs(images=(ImageFiles(images),)),
        (LayerSelection("conv1"),),
        form=NativeForm,
    )
    return engine.extract(request, Call()).items


def test_an_image_of_too_many_pixels_is_refused(engine) -> None:
    """Its header shows this, before anything is decoded."""
    assert ask(engine, png(40, 25)) == 1
    with pytest.raises(errors.InvalidInputError, match=r"images\[1\]: got 40 x 26 pixels"):
        ask(engine, png(40, 25), png(40, 26))


def test_images_of_too_many_pixels_together_are_refused(engine) -> None:
    """The sizes at which images are kept count; the error names the first that doesn't fit."""
    assert ask(engine, *[png(20, 20)] * MOST) == MOST
    with pytest.raises(errors.InvalidInputError, match=rf"images\[{MOST}\]: .* 4000 pixels"):
        ask(engine, *[png(20, 20)] * (MOST + 2))


def test_images_of_a_size_that_the_model_lacks_are_refused() -> None:
    """If the preprocessing doesn't crop, the size is checked before the model runs."""
    engine = Engine(plan_cache=kept())
    images = ImageSettings(resize=(), crop=(), mean=(), std=())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM, free_dims=(), images=images))
    try:
        assert ask(engine, png(*ITEM[1:])) == 1
        with pytest.raises(errors.InvalidInputError, match=r"images: got \[1, 3, 30, 20\] after"):
            ask(engine, png(20, 30))
    finally:
        engine.close()
