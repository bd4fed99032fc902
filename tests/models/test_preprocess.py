"""An image file becomes what the model's own transform returns; assumptions are reported."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import models, transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from batches import images_for
from layertap.errors import ConfigError, InvalidInputError, ModelLoadError
from layertap.models import ImageBatch, ImageSettings, InputSpec, Preprocess
from layertap.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, choose_preprocess, fitted
from layertap.settings import Color

Encode = Callable[..., bytes]

COLOUR = InputSpec((3, 224, 224), free=(1, 2))
GRAY = InputSpec((1, 64, 64), free=(1, 2))


def of(builder: str) -> Preprocess:
    """Return the preprocessing of a builder's default weights."""
    return Preprocess.of(models.get_model_weights(builder).DEFAULT.transforms())


def chosen(
    settings: ImageSettings, takes: InputSpec = COLOUR, known: Preprocess | None = None
) -> Preprocess:
    """Return the preprocessing of a model that takes images."""
    preprocess = choose_preprocess(known, settings, takes, "net")
    assert preprocess is not None
    return preprocess


@pytest.mark.parametrize("builder", ["resnet18", "inception_v3", "fcn_resnet50", "ssd300_vgg16"])
def test_equals_the_weights_own_transforms(builder: str, photo: Image.Image) -> None:
    """A photo becomes the same tensor as with torchvision's transforms, bit for bit."""
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
    """The description lists the steps in order, with their numbers."""
    assert of(builder).describe() == f"EXIF orientation applied, RGB (alpha dropped), {words}"


def test_a_batch_is_its_items_stacked(
    photo: Image.Image, photo_bytes: bytes, encoded: Encode
) -> None:
    """If the preprocessing crops, images of different sizes make one batch."""
    narrow = photo.resize((100, 300))
    preprocess = of("resnet18")

    batch = images_for(preprocess, photo_bytes, encoded(narrow, "PNG"))

    assert batch.shape == (2, 3, 224, 224)
    assert torch.equal(batch[1], preprocess(narrow))


@pytest.mark.parametrize(
    ("builder", "size"), [("resnet18", (224, 224)), ("lraspp_mobilenet_v3_large", (609, 520))]
)
def test_the_work_needs_no_pytorch(
    builder: str, size: tuple[int, int], photo: Image.Image, photo_bytes: bytes
) -> None:
    """Decoding gives the finished item, with the values of torchvision's own functions."""
    preprocess = of(builder)

    item = preprocess.decode(photo_bytes, 0)

    assert isinstance(item, np.ndarray)
    assert item.shape == (3, *size)
    assert torch.equal(torch.from_numpy(item), preprocess(photo))


def test_sizes_must_agree_where_nothing_crops(photo: Image.Image, encoded: Encode) -> None:
    """Images of different sizes can't be a batch; the message has both sizes."""
    files = [encoded(photo.resize((40, height)), "PNG") for height in (30, 31)]
    with pytest.raises(InvalidInputError) as caught:
        images_for(of("ssd300_vgg16"), *files)

    assert "images[1]: got 40 x 31 pixels after preprocessing, expected 40 x 30 pixels" in str(
        caught.value
    )


def test_an_empty_batch_is_refused() -> None:
    """A batch has at least one image."""
    with pytest.raises(InvalidInputError, match="images: got none"):
        ImageBatch(of("resnet18"), 0)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
def test_extreme_proportions_are_refused(size: tuple[int, int], encoded: Encode) -> None:
    """Resizing a sliver's short side does not create hundreds of millions of pixels."""
    data = encoded(Image.new("RGB", size), "PNG")
    with pytest.raises(InvalidInputError, match=rf"images\[2\]: got {size[0]} x {size[1]} pixels"):
        of("resnet18").decode(data, 2)


def test_slivers_pass_where_nothing_resizes() -> None:
    """Without resizing no image grows, so its proportions don't matter."""
    assert of("ssd300_vgg16")(Image.new("RGB", (1, 10_000))).shape == (3, 10_000, 1)


def test_a_picture_is_turned_by_its_exif_orientation(photo: Image.Image, encoded: Encode) -> None:
    """An image is turned as it is displayed, or left as stored if so configured."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo, "PNG", exif=exif)
    transform = models.ResNet18_Weights.DEFAULT.transforms()

    upright = of("resnet18")
    stored = chosen(ImageSettings(exif_orientation=False), known=upright)

    turned = transform(photo.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(images_for(upright, data)[0], turned)
    assert torch.equal(images_for(stored, data)[0], transform(photo))
    assert stored.describe().startswith("EXIF orientation not applied, ")


def test_one_channel_models_get_gray_images(photo: Image.Image, photo_bytes: bytes) -> None:
    """A model with one channel gets a photo's luma, as torchvision's Grayscale computes it."""
    preprocess = chosen(ImageSettings(mean=(0.5,), std=(0.25,), resize=(64, 64)), GRAY)
    reference = transforms.Compose(
        [
            transforms.Grayscale(),
            transforms.Resize((64, 64)),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.25]),
        ]
    )

    got = images_for(preprocess, photo_bytes)

    assert got.shape == (1, 1, 64, 64)
    assert torch.equal(got[0], reference(photo))


def test_a_model_of_colour_can_be_given_gray_images(photo: Image.Image, photo_bytes: bytes) -> None:
    """The luma is repeated in three channels, as by torchvision's Grayscale(3)."""
    transform = ImageClassification(crop_size=224)

    preprocess = chosen(ImageSettings(color="gray"), known=Preprocess.of(transform))

    got = images_for(preprocess, photo_bytes)
    assert torch.equal(got[0], transform(transforms.Grayscale(3)(photo)))


@pytest.mark.parametrize("takes", [GRAY, COLOUR])
def test_16_bit_grayscale_is_divided_by_65535(takes: InputSpec, encoded: Encode) -> None:
    """All 16 bits are used: the result has more than 256 levels, in the right places."""
    ramp = np.linspace(2000, 60000, 64 * 64, dtype=np.uint16).reshape(64, 64)
    preprocess = chosen(ImageSettings(mean=(), std=(), resize=(), crop=()), takes)

    got = images_for(preprocess, encoded(Image.fromarray(ramp), "PNG"))[0]

    expected = torch.from_numpy(ramp.astype(np.float32)) / 65535
    assert all(torch.equal(channel, expected) for channel in got)
    assert len(got) == takes.shape[0]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_16_bit_grayscale_is_turned_too(orientation: int, encoded: Encode) -> None:
    """A 16-bit PNG with an EXIF orientation is turned, with all its bits."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (30, 40)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    wide = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    preprocess = chosen(ImageSettings(mean=(), std=(), resize=(), crop=()), GRAY)

    got = images_for(preprocess, data)[0, 0]

    assert torch.equal(got, torch.from_numpy(wide.astype(np.float32)) / 65535)


def test_16_bit_grayscale_is_resized_like_others(encoded: Encode) -> None:
    """Resizing, cropping and padding a 16-bit PNG gives the same as the steps for 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 50)).astype(np.uint8)
    shallow = encoded(Image.fromarray(pixels), "PNG")
    deep = encoded(Image.fromarray(pixels.astype(np.uint16) * 257), "PNG")
    for crop in ((64, 64), (200, 64)):
        settings = ImageSettings(resize=(70,), crop=crop, mean=(0.5,), std=(0.5,))
        preprocess = chosen(settings, InputSpec((1, *crop), free=(1, 2)))

        one, other = (images_for(preprocess, d) for d in (shallow, deep))

        assert torch.allclose(one, other, atol=2 / 255)
        assert one.std() > 0.1


@pytest.mark.parametrize("side", [8, 224])
def test_images_of_unknown_models_are_assumed_to_be_imagenets(
    side: int, photo: Image.Image
) -> None:
    """A model that says nothing gets ResNet's steps, and every step is reported as assumed."""
    preprocess = chosen(ImageSettings(), InputSpec((3, side, side), free=(1, 2)))

    expected = ImageClassification(crop_size=side, resize_size=round(side * 256 / 224))(photo)
    assert torch.equal(preprocess(photo), expected)
    assert preprocess.assumed == (
        *("image_mean", "image_std", "image_resize", "image_crop", "image_interpolation"),
    )
    assert "defaults, as nothing specifies them: image_mean, image_std" in preprocess.describe()


def test_one_channel_is_not_normalised_by_assumption(photo: Image.Image) -> None:
    """ImageNet's numbers are for three channels; one channel stays in [0, 1]."""
    preprocess = chosen(ImageSettings(), GRAY)

    assert 0 <= preprocess(photo.convert("L")).min() <= preprocess(photo.convert("L")).max() <= 1
    assert (preprocess.color, preprocess.channels) == (Color.GRAY, 1)


def test_what_is_set_is_not_assumed(photo: Image.Image) -> None:
    """Each key replaces one assumption; if all are set, nothing is assumed."""
    some = chosen(ImageSettings(mean=(0.5,), std=(0.5,), resize=(300, 280)))
    every = chosen(
        ImageSettings(
            mean=(0.1, 0.2, 0.3),
            std=(0.4, 0.5, 0.6),
            resize=(240,),
            crop=(224,),
            interpolation="bicubic",
        )
    )
    reference = transforms.Compose(
        [
            transforms.Resize(240, InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ]
    )

    assert some.assumed == ("image_interpolation",)
    assert some(photo).shape == (3, 300, 280)
    assert every.assumed == ()
    assert torch.equal(every(photo), reference(photo))
    assert (
        "set in the server's configuration: image_mean, image_std, image_resize" in every.describe()
    )


def test_settings_replace_known_steps_one_by_one(photo: Image.Image) -> None:
    """A mean and standard deviation that are set leave the weights' resize and crop unchanged."""
    known = Preprocess.of(ImageClassification(crop_size=224, resize_size=232), "the weights")

    preprocess = chosen(ImageSettings(mean=(0.5,) * 3, std=(0.5,) * 3), known=known)

    reference = ImageClassification(crop_size=224, resize_size=232, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(preprocess(photo), reference(photo))
    assert preprocess.assumed == ()
    assert (
        preprocess.origin == "the weights; set in the server's configuration: image_mean, image_std"
    )


@pytest.mark.parametrize(
    ("settings", "takes", "message"),
    [
        (
            ImageSettings(color="rgb"),
            GRAY,
            "image_color of net: got 'rgb', but the model takes one",
        ),
        (ImageSettings(mean=IMAGENET_MEAN), GRAY, "image_mean of net: .* 1 channels"),
        (ImageSettings(mean=(0.5,)), InputSpec((3, 8)), r"its input is \[B, 3, 8\] float32, which"),
        (
            ImageSettings(exif_orientation=True),
            InputSpec((5,), dtype=torch.int64),
            "exif_orientation of net: its input is .* int64",
        ),
        (
            ImageSettings(crop=(100,)),
            InputSpec((3, 64, 64)),
            r"image_crop of net: got 100 x 100 .* takes \[B, 3, 64, 64\]",
        ),
        (
            ImageSettings(resize=(100, 90)),
            InputSpec((3, 64, 64)),
            r"image_resize of net: got 100 x 90 ",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: ImageSettings, takes: InputSpec, message: str
) -> None:
    """A setting that contradicts the model's input is an error at load that names both."""
    with pytest.raises(ConfigError, match=message):
        choose_preprocess(None, settings, takes, "net")


@pytest.mark.parametrize(
    "takes", [InputSpec((4, 8, 8)), InputSpec((3, 8)), InputSpec((3, 4, 8, 8))]
)
def test_other_inputs_take_no_images(takes: InputSpec) -> None:
    """An input that is not an image of one or three channels gets no image preprocessing."""
    assert choose_preprocess(None, ImageSettings(), takes, "net") is None


def test_an_input_that_was_found_decides_about_images() -> None:
    """If the model takes no images, assumptions are dropped, and settings are an error."""
    assumed = chosen(ImageSettings(), InputSpec((3, 64, 64), free=(1, 2)))
    given = chosen(ImageSettings(crop=(32,)), InputSpec((3, 64, 64), free=(1, 2)))
    fixed = InputSpec((3, 64, 64))

    assert fitted(assumed, fixed, "net") is assumed
    assert fitted(assumed, replace(fixed, dtype=torch.uint8), "net") is None
    with pytest.raises(ConfigError, match="image_crop of net: got 32 x 32"):
        fitted(given, fixed, "net")
    with pytest.raises(ConfigError, match="images of net: .* int64, which is not an image"):
        fitted(given, replace(fixed, dtype=torch.int64), "net")


def test_common_chains_become_steps(photo: Image.Image) -> None:
    """A chain of Resize, CenterCrop, ToTensor and Normalize is split into steps."""
    chain = transforms.Compose(
        [
            transforms.Resize(100, InterpolationMode.BICUBIC),
            transforms.CenterCrop((90, 80)),
            transforms.ToTensor(),
            transforms.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        ]
    )

    preprocess = Preprocess.of(chain)

    assert torch.equal(preprocess(photo), chain(photo))
    assert preprocess.shape == (3, 90, 80)
    assert "normalize mean [0.485, 0.456, 0.406] std [0.229, 0.224, 0.225]" in preprocess.describe()


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: transforms.functional.to_tensor(image.resize((224, 224))) * 2 - 1,
        transforms.Compose([transforms.Resize((224, 224)), transforms.PILToTensor()]),
        transforms.Compose(
            [
                transforms.Resize(224, max_size=300),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
            ]
        ),
    ],
)
def test_other_functions_run_as_they_are(
    transform: Callable[[Image.Image], torch.Tensor], photo: Image.Image
) -> None:
    """A function with unknown steps is called as a whole, and named to clients."""
    own = Preprocess.of(transform, "the factory")

    preprocess = chosen(ImageSettings(), known=own)

    assert torch.equal(preprocess(photo), transform(photo).float())
    assert preprocess.describe().endswith("; the factory")
    assert preprocess.assumed == ()


@pytest.mark.parametrize("convert", [np.asarray, lambda tensor: tensor])
def test_an_image_processor_of_hugging_face_is_a_function(
    convert: Callable[[torch.Tensor], object], photo: Image.Image
) -> None:
    """A function may return a mapping with a batch of one under ``pixel_values``."""

    def transform(image: Image.Image) -> torch.Tensor:
        return transforms.functional.to_tensor(image.resize((224, 224)))

    own = Preprocess.of(lambda image: {"pixel_values": [convert(transform(image))]})

    assert torch.equal(chosen(ImageSettings(), known=own)(photo), transform(photo))


def test_a_function_of_its_own_gets_the_upright_picture(
    photo: Image.Image, encoded: Encode
) -> None:
    """The EXIF orientation is applied before the function, unless that is disabled."""
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encoded(photo, "PNG", exif=exif)

    def transform(image: Image.Image) -> torch.Tensor:
        return transforms.functional.to_tensor(image.resize((224, 224)))

    own = Preprocess.of(transform)
    upright, stored = (
        chosen(ImageSettings(exif_orientation=wanted), known=own) for wanted in (None, False)
    )

    turned = transform(photo.transpose(Image.Transpose.ROTATE_90))
    assert torch.equal(images_for(upright, data)[0], turned)
    assert torch.equal(images_for(stored, data)[0], transform(photo))


def test_steps_of_a_function_can_not_be_replaced() -> None:
    """A mean for a function with unknown steps would be a guess, so it is refused."""
    own = Preprocess.of(transforms.functional.to_tensor)

    with pytest.raises(ConfigError, match=r"image_mean of net: .* can't be replaced one by one"):
        choose_preprocess(own, ImageSettings(mean=(0.5,)), COLOUR, "net")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image.no_such_method(), "it raised AttributeError"),
        (lambda image: image, "it raised RuntimeError"),
        (transforms.Compose([transforms.PILToTensor()]), r"of shape \[3, 240, 320\]"),
    ],
)
def test_a_function_that_does_not_fit_is_a_load_error(
    transform: Callable[[Image.Image], torch.Tensor], message: str
) -> None:
    """It is called once at load: if it raises or returns another shape, that is an error."""
    with pytest.raises(ModelLoadError, match=message):
        choose_preprocess(
            Preprocess.of(transform), ImageSettings(), replace(COLOUR, free=()), "net"
        )
