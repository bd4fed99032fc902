"""``layertap extract``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layertap.cli.options import embedded_engine, local_model_options, refuse_with_server
from layertap.errors import InvalidInputError
from layertap.selection import Extractor, LayerSelection, Reduction

if TYPE_CHECKING:
    from layertap.cli.connection import Connection
    from layertap.client import Features

    Source = Callable[[list[bytes]], Features]

__all__ = ["extract"]

DTYPES = ("float32", "float16", "bfloat16")

_INDEX = re.compile(r"\bimages\[(\d+)\]")


@click.command(short_help="Write layers of images into an .npz file.")
@click.argument("model", metavar="MODEL")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path())
@click.option(
    "-l",
    "--layer",
    "texts",
    multiple=True,
    required=True,
    metavar="LAYER[:input][=NAME]",
    help="What to write; may be repeated, and may be a glob.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The .npz file; one that is there is replaced.",
)
@click.option(
    "--extractor",
    type=click.Choice([extractor.value for extractor in Extractor]),
    default=Extractor.AUTO.value,
    help="How to take them.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="What to send floats in; bfloat16 is stored as float32, as .npz lacks it.",
)
@click.option(
    "--reduce",
    "reduction",
    type=click.Choice([reduction.value for reduction in Reduction]),
    default=Reduction.NONE.value,
    help="What to do with each layer first.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Images that run together.",
)
@local_model_options
def extract(
    model: str,
    images: tuple[str, ...],
    texts: tuple[str, ...],
    output: Path,
    extractor: str,
    dtype: str | None,
    reduction: str,
    batch_size: int,
    server: Connection | None,
    **flags: Any,
) -> None:
    """Write layers of IMAGEs into an .npz file: an array for each layer, a row for each image.

    MODEL is a torchvision model (resnet18), a TorchScript file (net.pt) or a factory
    (package.module:function); with --server, the name of a model that it serves. Images are JPEG,
    PNG or WebP.

    \b
    Examples:
      layertap extract resnet18 *.jpg -l layer4 --reduce global_average_pool -o features.npz
      layertap extract resnet18 cat.jpg -l layer1 -l avgpool:input=before -o cat.npz
      layertap extract resnet18 cat.jpg -l layer1 -o cat.npz --server 127.0.0.1:8001
      python -c "import numpy; print(numpy.load('cat.npz')['layer1'].shape)"
    """
    refuse_with_server(server, flags)
    selections = [
        replace(LayerSelection.parse(text), reduction=Reduction(reduction), dtype=dtype or "")
        for text in texts
    ]
    _check_files(images, output)
    from layertap.cli.npz import Columns
    from layertap.cli.render import Stderr, show_features

    columns = Columns()
    terminal = Stderr()
    how = Extractor(extractor)
    opened = (
        _remote(server, model, selections, how)
        if server
        else _embedded(terminal, model, selections, how, flags)
    )
    with opened as ask, terminal.counting("images", len(images)) as bar:
        for begin in range(0, len(images), batch_size):
            batch = [_read(image) for image in images[begin : begin + batch_size]]
            with _naming(images[begin:]):
                columns.add(ask(batch), len(batch))
            bar.advance(bar.task_ids[0], len(batch))
    columns.save(output)
    show_features(columns.rows())


def _check_files(images: Sequence[str], output: Path) -> None:
    """Find out before a model is loaded what could only fail after it."""
    for image in images:
        if not Path(image).is_file():
            raise InvalidInputError(f"image {image}: no such file")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InvalidInputError(f"output {output}: no such folder {output.parent}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"output {output}: the folder {output.parent} can't be written to")


def _read(image: str) -> bytes:
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"image {image}: {error.strerror}") from error


@contextmanager
def _naming(images: Sequence[str]) -> Iterator[None]:
    """Have errors name the files of a batch, which begins the list, instead of its indices."""
    try:
        yield
    except InvalidInputError as error:
        text = _INDEX.sub(lambda match: f"image {images[int(match[1])]}", str(error))
        raise InvalidInputError(text) from error


@contextmanager
def _remote(
    server: Connection, model: str, selections: list[LayerSelection], extractor: Extractor
) -> Iterator[Source]:
    with server.client() as client:
        yield lambda images: client.extract(model, images, selections, extractor=extractor)


@contextmanager
def _embedded(
    terminal: Any,
    model: str,
    selections: list[LayerSelection],
    extractor: Extractor,
    flags: dict[str, Any],
) -> Iterator[Source]:
    from layertap.client import Features
    from layertap.engine import Call, ExtractionRequest, ImagesInput

    with terminal.busy(f"loading {model}"):
        engine, name = embedded_engine(model, **flags)
    if assumed := engine.host(name).model.assumptions():
        terminal.say(f"warning: {assumed}")

    def ask(images: list[bytes]) -> Features:
        request = ExtractionRequest(name, ImagesInput(images), tuple(selections), extractor)
        return Features(engine.extract(request, Call()).message)

    try:
        yield ask
    finally:
        engine.close()
