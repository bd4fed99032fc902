"""Options that several verbs share, and the types of their values."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from layertap.cli.connection import connection_options

if TYPE_CHECKING:
    from layertap.cli.connection import Connection
    from layertap.engine import Engine

__all__ = [
    "IMAGE_FLAGS",
    "device",
    "embedded_engine",
    "find_local_modules",
    "image_options",
    "input_options",
    "item_shape",
    "local_model_options",
    "refuse_with_server",
    "seed",
    "weights_key",
]

F = TypeVar("F", bound=Callable[..., Any])

# As layertap.engine.DEVICE_PATTERN, which can't be imported without PyTorch; a test compares them.
DEVICES = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
IMAGE_FLAGS = (
    *("image_mean", "image_std", "image_resize", "image_crop"),
    *("image_interpolation", "image_color", "exif_orientation"),
)


def item_shape(function: F) -> F:
    """Add ``--item-shape``, whose value is a tuple of sizes."""
    return click.option(
        "--item-shape",
        metavar="C,H,W",
        callback=_sizes,
        help="Sizes of one input item without the batch; default: the model's own.",
    )(function)


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        sizes = tuple(int(size) for size in value.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"got {value!r}, expected positive sizes such as 3,224,224")
    return sizes


def _numbers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    if value is None or value == "none":
        return None if value is None else ()
    try:
        return tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"got {value!r}, expected numbers such as 0.485,0.456,0.406, or none"
        ) from None


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    return () if value == "none" else _sizes(ctx, param, value)


def image_options(function: F) -> F:
    """Add the options of the image preprocessing; their names are ``IMAGE_FLAGS``."""
    for option in (
        click.option(
            "--exif-orientation/--no-exif-orientation",
            default=None,
            help="Turn pictures as their EXIF orientation says (the default).",
        ),
        click.option(
            "--image-color",
            type=click.Choice(["rgb", "gray"]),
            help="The channels that image files are decoded to.",
        ),
        click.option(
            "--image-interpolation",
            type=click.Choice(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
            help="How images are resized.",
        ),
        click.option(
            "--image-crop",
            metavar="N|H,W",
            callback=_size,
            help="Cut this size out of the centre of images; none leaves them whole.",
        ),
        click.option(
            "--image-resize",
            metavar="N|H,W",
            callback=_size,
            help="Resize the short side of images to N, or images to H x W; none leaves them.",
        ),
        click.option(
            "--image-std",
            metavar="S,S,S",
            callback=_numbers,
            help="Divide the pixels by this, after --image-mean was subtracted; or none.",
        ),
        click.option(
            "--image-mean",
            metavar="M,M,M",
            callback=_numbers,
            help="Subtract this from pixels in [0, 1]; none for no normalisation. The image "
            "options replace steps of the preprocessing that the model's configuration describes.",
        ),
    ):
        function = option(function)
    return function


def input_options(function: F) -> F:
    """Add ``--input-dtype`` and ``--free-dims``: what a model's input is declared to be."""
    for option in (
        click.option(
            "--free-dims",
            metavar="I,J",
            callback=_indices,
            help="Dimensions of the input that may have another size, as indices into the item "
            "shape: 0 for token ids of any length, 1,2 for images of any size, none. Default: "
            "found by trying.",
        ),
        click.option(
            "--input-dtype",
            metavar="TYPE",
            help="The input's element type, such as int64; default: found by trying.",
        ),
    ):
        function = option(function)
    return function


def device(function: F) -> F:
    """Add ``--device``."""
    return click.option(
        "--device",
        metavar="DEVICE",
        callback=_device,
        help="auto (the default), cpu, cuda, or one of several as cuda:1; auto is CUDA where there "
        "is a device.",
    )(function)


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not DEVICES.fullmatch(value):
        raise click.BadParameter(f"got {value!r}, expected auto, cpu, cuda or cuda:1")
    return value


def _indices(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = [] if value == "none" else value.split(",")
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"got {value!r}, expected indices such as 1,2, or none")
    return tuple(map(int, parts))


def seed(function: F) -> F:
    """Add ``--seed``."""
    return click.option(
        "--seed", type=click.IntRange(min=0), help="Seeds the values of --weights random."
    )(function)


def weights_key(function: F) -> F:
    """Add ``--weights-key``."""
    return click.option(
        "--weights-key",
        metavar="KEY",
        help="Which state dict of the weights file is meant, such as teacher.backbone; default: "
        "the one that has the model's names.",
    )(function)


def local_model_options(function: F) -> F:
    """Add the options of a model that is loaded into this process, and ``--server`` instead."""
    for option in (
        connection_options(),
        image_options,
        device,
        input_options,
        item_shape,
        seed,
        weights_key,
        click.option(
            "--weights",
            metavar="W",
            help="DEFAULT, a torchvision name such as IMAGENET1K_V1, a file or folder, or random.",
        ),
    ):
        function = option(function)
    return function


def refuse_with_server(server: Connection | None, flags: dict[str, object]) -> None:
    """Raise UsageError for flags that say how to load a model, where a server has it loaded."""
    given = ", ".join(f"--{name.replace('_', '-')}" for name, v in flags.items() if v is not None)
    if server and given:
        raise click.UsageError(f"{given}: the server chose; not together with --server")


def embedded_engine(
    model: str,
    *,
    weights: str | None,
    seed: int | None,
    item_shape: Sequence[int] | None,
    device: str | None,
    input_dtype: str | None = None,
    free_dims: Sequence[int] | None = None,
    weights_key: str | None = None,
    **images: Any,
) -> tuple[Engine, str]:
    """Load a model into this process.

    Args:
        model: ``[NAME=]SOURCE``.
        weights: As in ModelSpec, like ``seed`` and ``item_shape``; None for their defaults.
        seed: See there.
        item_shape: See there.
        device: What to run on; None for ``auto``.
        input_dtype: As in ModelSpec.
        free_dims: As in ModelSpec.
        weights_key: As in ModelSpec.
        images: The values of ``IMAGE_FLAGS``.

    Returns:
        The engine, which is the caller's to close, and the model's name in it.

    Raises:
        ConfigError, ModelLoadError: As ``Engine.load`` does.
    """
    from layertap.engine import Engine, allow_tf32, choose_device
    from layertap.models import ImageSettings, ModelSpec

    find_local_modules()
    spec = ModelSpec.parse(
        model,
        weights=weights or "DEFAULT",
        weights_key=weights_key or "",
        seed=seed or 0,
        item_shape=tuple(item_shape) if item_shape else None,
        input_dtype=input_dtype or "",
        free_dims=None if free_dims is None else tuple(free_dims),
        images=ImageSettings(**{n.removeprefix("image_"): value for n, value in images.items()}),
    )
    allow_tf32(False)
    engine = Engine(device=choose_device(device or "auto"))
    try:
        engine.load(spec)
    except BaseException:
        engine.close()
        raise
    return engine, spec.name


def find_local_modules() -> None:
    """Let factories ``module:function`` be found in the current folder, as ``python -m`` would.

    Last, so that no file there takes the place of an installed module.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
