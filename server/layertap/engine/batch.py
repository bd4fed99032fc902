"""Converts a request's inputs to a batch: checks tensors, decodes and preprocesses images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layertap.errors import InvalidInputError
from layertap.models import Batch, ImageBatch, ImageLimits, LoadedModel, Preprocess
from layertap.models.text import DEFAULT_OPTIONS
from layertap.settings import Limits
from layertap.silence import warnings_ignored
from layertap.texts import TextOptions
from layertap.wire.tensors import TensorView

__all__ = [
    "AudioFiles",
    "ImageFiles",
    "Inputs",
    "Parts",
    "TextBatch",
    "batch_bytes",
    "check_image_count",
    "check_tensors",
    "image_batch",
    "parts_of",
    "preprocess_images",
]

with warnings_ignored():
    # torch warns once per process that it can't protect a read-only buffer from being written to.
    # A request's bytes belong to that request alone, and models that write into their batch get a
    # copy, so this triggers the warning once, where it is ignored.
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Encoded images, one for each item of a batch, or the frames of each item's video.

    Attributes:
        images: The files; the frames of a video in their order, one video after the other.
        name: The input that they are for; may be empty if only one input takes images.
    """

    images: Sequence[bytes]
    name: str = ""


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts, one for each item of a batch.

    Attributes:
        texts: The texts.
        options: How they are tokenised.
        name: The input that they are for; may be empty if only one input takes texts.
    """

    texts: Sequence[str]
    options: TextOptions = DEFAULT_OPTIONS
    name: str = ""


@dataclass(frozen=True, slots=True)
class AudioFiles:
    """Recordings, one for each item of a batch.

    Attributes:
        files: WAV or FLAC files.
        name: The input that they are for; may be empty if only one input takes recordings.
    """

    files: Sequence[bytes]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs in a request: a tensor, images, texts or recordings for each.

    Attributes:
        tensors: Tensors by name; the name may be empty if the model needs only one input.
        images: Images, for inputs without a tensor.
        texts: Texts, for inputs of token ids without a tensor.
        audio: Recordings, for inputs without a tensor.
    """

    tensors: tuple[TensorView, ...] = ()
    images: tuple[ImageFiles, ...] = ()
    texts: tuple[TextBatch, ...] = ()
    audio: tuple[AudioFiles, ...] = ()

    @property
    def may_be_infinite(self) -> bool:
        """Whether a tensor that is made of them may hold NaN or infinity; images never do."""
        return bool(self.tensors or self.audio)


_PIXEL_BYTES = 4
"""Bytes per pixel: Pillow stores a pixel of an RGB image in four bytes."""

KEPT_IMAGES = 4
"""Limit on a request's resized images in total, as a multiple of the largest allowed image.

A file of a few kilobytes can have as many pixels as one image may have. Without this limit, nothing
would bound the total of a request with a thousand such files.
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the server converts to tensors, by the name of the input that it is for.

    Attributes:
        images: Encoded images.
        texts: Texts.
        audio: Recordings.
    """

    images: dict[str, ImageFiles]
    texts: dict[str, TextBatch]
    audio: dict[str, AudioFiles]


def parts_of(model: LoadedModel, given: Inputs, limits: Limits) -> Parts:
    """Return a request's images, texts and recordings by input.

    Raises:
        InvalidInputError: A name is not that of such an input, an input is given twice, a batch is
            empty or too large, or the inputs have different numbers of items.
    """
    images = {_image_input(model, each.name): each for each in given.images}
    texts = {_text_input(model, each.name): each for each in given.texts}
    audio = {_audio_input(model, each.name): each for each in given.audio}
    _check_given_once(model, given)
    for name, files in images.items():
        if not files.images:
            raise InvalidInputError(f"images: got none for {name!r}, expected at least one")
    for name, recordings in audio.items():
        if not recordings.files:
            raise InvalidInputError(f"audio: got none for {name!r}, expected at least one")
    made = {
        f"the images of {name!r}": _items_of(model, name, files) for name, files in images.items()
    }
    made |= {f"the texts of {name!r}": len(batch.texts) for name, batch in texts.items()}
    made |= {f"the audio of {name!r}": len(each.files) for name, each in audio.items()}
    _check_sizes(given, made, limits)
    return Parts(images, texts, audio)


_TENSOR = "a tensor"


def _check_given_once(model: LoadedModel, given: Inputs) -> None:
    seen: dict[str, str] = {}
    for name, kind in _kinds(model, given):
        # Two tensors of one name are refused with the names of all tensors.
        if name in seen and kind != _TENSOR:
            raise InvalidInputError(
                f"input {name!r}: got {seen[name]} and {kind}, expected it once"
            )
        seen[name] = kind


def _kinds(model: LoadedModel, given: Inputs) -> Iterator[tuple[str, str]]:
    """Yield each input that a request gives, and as what."""
    for view in given.tensors:
        yield view.name or model.signature.main.name, _TENSOR
    for files in given.images:
        yield _image_input(model, files.name), "images"
    for batch in given.texts:
        yield _text_input(model, batch.name), "texts"
    for recordings in given.audio:
        yield _audio_input(model, recordings.name), "audio"


def _items_of(model: LoadedModel, name: str, files: ImageFiles) -> int:
    """Return the number of items for which there are images: one for each, or a video's frames."""
    frames = model.signature.spec(name).images
    items, rest = divmod(len(files.images), frames)
    if rest:
        raise InvalidInputError(
            f"images: got {len(files.images)} for {name!r}, expected a multiple of {frames}, as an "
            f"item is a video of {frames} frames"
        )
    return items


def _check_sizes(given: Inputs, made: Mapping[str, int], limits: Limits) -> None:
    """Check the numbers of items; ``made`` has those of what is converted, by what it is."""
    for what, size in made.items():
        if size > limits.batch:
            raise InvalidInputError(
                f"input: got a batch of {size}, {what}, expected at most {limits.batch}"
            )
    # Tensors alone are compared when the whole batch is checked.
    sent = {repr(view.name): view.shape[0] for view in given.tensors if view.shape}
    sizes = {**sent, **made}
    if made and len(set(sizes.values())) > 1:
        words = ", ".join(f"{size} of {what}" for what, size in sizes.items())
        raise InvalidInputError(f"inputs: got batches of {words}, expected one size for all")


def _image_input(model: LoadedModel, name: str) -> str:
    taken = model.image_inputs if model.preprocess else ()
    if not taken:
        raise InvalidInputError(
            f"images: model {model.name!r} takes none, expected {model.signature.pattern}"
        )
    if not name and len(taken) == 1:
        return taken[0]
    return _one_of(taken, name, "images")


def _text_input(model: LoadedModel, name: str) -> str:
    taken = model.text_inputs
    if not taken:
        raise InvalidInputError(
            f"texts: model {model.name!r} takes none, as it has no tokenizer; expected "
            f"{model.signature.pattern}"
        )
    # Texts are rarely meant for a decoder's own input.
    return _one_of(taken, name or taken[0], "texts")


def _audio_input(model: LoadedModel, name: str) -> str:
    taken = model.audio_inputs if model.audio else ()
    if not taken:
        raise InvalidInputError(
            f"audio: model {model.name!r} takes none, as it has no feature extractor that the "
            f"server can use; expected {model.signature.pattern}"
        )
    return _one_of(taken, name or taken[0], "audio")


def _one_of(taken: Sequence[str], name: str, kind: str) -> str:
    if name not in taken:
        raise InvalidInputError(
            f"{kind}: got them for input {name!r}, expected {' or '.join(map(repr, taken))}"
        )
    return name


def check_tensors(
    model: LoadedModel,
    views: Sequence[TensorView],
    limits: Limits,
    made: Mapping[str, torch.Tensor] | None = None,
) -> Batch:
    """Check a request's tensors; return them as a batch on the CPU, without a copy.

    Args:
        model: The model that takes them.
        views: The tensors that were sent.
        limits: What requests may contain.
        made: Tensors by name that were made of what was sent for other inputs.

    Raises:
        InvalidInputError: A name, rank, size, dtype or the batch size is not what the model takes.
    """
    signature, made = model.signature, made or {}
    given = _by_name(views)
    facts = {name: (view.shape, view.dtype.name) for name, view in given.items()}
    for name, tensor in made.items():
        # The dtype is not checked: images are float32, and are converted to the model's dtype.
        facts[name] = (tuple(tensor.shape), signature.spec(name).dtype_name)
    _check_size(signature.check(facts), limits)
    if "" in given:
        given = {signature.main.name: given[""]}
    return Batch(
        {
            spec.name: made[spec.name] if spec.name in made else _tensor(given[spec.name])
            for spec in signature.inputs
            if spec.name in made or spec.name in given
        }
    )


def _by_name(views: Sequence[TensorView]) -> dict[str, TensorView]:
    given = {view.name: view for view in views}
    if len(given) != len(views):
        names = ", ".join(repr(view.name) for view in views)
        raise InvalidInputError(f"inputs: got {names}, expected each name once")
    return given


def _tensor(view: TensorView) -> torch.Tensor:
    if view.dtype.name == "bfloat16":
        return torch.from_numpy(view.array().view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(view.array())


def image_batch(
    model: LoadedModel, images: Sequence[bytes], limits: Limits, admit: Callable[[int], object]
) -> tuple[ImageBatch, Callable[[int], None]]:
    """Return a batch for image files, and the task that decodes one of them into it.

    The task runs no torch code, so any thread may run it; several may at once.

    Args:
        model: The model that takes them.
        images: Encoded files.
        limits: The limits of requests.
        admit: Called with the bytes of each decoded image; may raise OverloadedError.

    Returns:
        The batch, and a function of an image's index. It raises OverloadedError if ``admit`` does,
        and InvalidInputError for a file that can't be decoded, one that can't be resized, or more
        pixels than are kept at once.
    """
    batch = ImageBatch(_preprocess(model), len(images))
    image_limits = ImageLimits(max_pixels=limits.pixels)
    kept: list[int] = []

    def decode(index: int) -> None:
        pixels = batch.decode(index, images[index], image_limits)
        admit(pixels * _PIXEL_BYTES)
        kept.append(pixels)
        _check_kept(model, sum(kept), index, limits)

    return batch, decode


def check_image_count(model: LoadedModel, count: int, limits: Limits) -> None:
    """Refuse more images than are kept at once, if the preprocessing gives them all one shape.

    Raises:
        InvalidInputError: There are too many.
    """
    shape = _preprocess(model).shape
    if shape is None:
        return
    pixels = math.prod(shape[1:])
    _check_kept(model, pixels * count, limits.pixels * KEPT_IMAGES // pixels, limits)


def _check_kept(model: LoadedModel, pixels: int, index: int, limits: Limits) -> None:
    most = limits.pixels * KEPT_IMAGES
    if pixels > most:
        raise InvalidInputError(
            f"with this one, the request's images have more than {most} pixels in total, the most "
            f"allowed, counted at the size in which model {model.name!r} takes them; send fewer "
            f"images at once",
            image=index,
        )


def batch_bytes(model: LoadedModel, name: str, count: int) -> int:
    """Return the size in bytes of the tensor that ``preprocess_images`` will return."""
    spec = model.signature.spec(name)
    return count * math.prod(spec.image.shape) * spec.dtype.itemsize


def preprocess_images(model: LoadedModel, name: str, images: ImageBatch) -> torch.Tensor:
    """Convert decoded images to a tensor ``[B, C, H, W]`` for one of the model's inputs.

    If the input takes videos, the tensor is ``[B, T, C, H, W]``.

    Call this on a compute thread if ``images.needs_torch``.

    Raises:
        InvalidInputError: If the preprocessed images differ in size, or have a size that the model
            doesn't take.
    """
    x, spec = images.tensor(), model.signature.spec(name)
    if spec.video:
        x = x.unflatten(0, (-1, spec.images))
    try:
        # The dtype is not checked: the batch is float32, and is converted to the model's dtype.
        spec.check(x.shape, spec.dtype_name)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"images: got {list(x.shape)} after preprocessing, expected {spec.pattern} as "
            f"model {model.name!r} takes, such as {list(spec.batch_shape(1))}"
        ) from error
    return x


def _preprocess(model: LoadedModel) -> Preprocess:
    if model.preprocess is None:
        raise ValueError("parts_of refuses images for models that take none")
    return model.preprocess


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.batch:
        raise InvalidInputError(f"input: got a batch of {size}, expected at most {limits.batch}")
