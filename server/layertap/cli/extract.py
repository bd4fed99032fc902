"""``layertap extract``: layers of image files, written to an .npz file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from layertap.cli.items import (
    ArrayItems,
    AudioItems,
    ImageItems,
    Items,
    TextItems,
    parse_array_files,
)
from layertap.cli.options import local_model, local_model_options, refuse_with_server
from layertap.errors import InvalidInputError
from layertap.objective import MAX_TERMS, Objective, parse_objective
from layertap.selection import (
    SENT_DTYPES,
    Capture,
    Extractor,
    Glob,
    LayerSelection,
    Method,
    Reduction,
)
from layertap.texts import Truncation

if TYPE_CHECKING:
    import numpy as np

    from layertap.cli.connection import ServerAddress
    from layertap.cli.render import Stderr
    from layertap.description import ModelDescription, ValueDescription
    from layertap.inputs import InputLike

__all__ = ["batch_axes", "extract"]

OBJECTIVE_AXES: dict[str, int | None] = {
    f"objective.{name}": 0
    for name in ("value", "index", *(f"index_{number}" for number in range(1, MAX_TERMS)))
}
"""The batch dimensions of what a reply tells about an objective."""

INPUTS = ("inputs", "model_inputs")
"""What the names of the model's inputs may begin with, as layers that have gradients."""


@click.command(short_help="Write layers of images, texts, audio or arrays into an .npz file.")
@click.argument("model", metavar="MODEL")
@click.argument("images", nargs=-1, metavar="[IMAGE...]", type=click.Path())
@click.option(
    "--input",
    "arrays",
    multiple=True,
    metavar="[NAME=]FILE.npy",
    help="An array with an item in each row, in place of images. Give one for each input of the "
    "model; the name may be left out for the only input that it needs.",
)
@click.option(
    "--text",
    "given_texts",
    multiple=True,
    metavar="TEXT",
    help="A text, in place of images. May be given several times.",
)
@click.option(
    "--texts",
    "texts_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A file of texts in UTF-8, one on each line; empty lines are left out.",
)
@click.option(
    "--truncation",
    type=click.Choice([truncation.value for truncation in Truncation]),
    default=Truncation.NONE.value,
    help="Where a text with too many tokens is cut. Default: none, which refuses it.",
)
@click.option(
    "--audio",
    "recordings",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="A WAV or FLAC file, in place of images. May be given several times.",
)
@click.option(
    "-l",
    "--layer",
    "layers",
    multiple=True,
    required=True,
    metavar="LAYER[:CAPTURE][=NAME]",
    help="A layer to write. May be given several times, and may be a glob. CAPTURE is output, "
    "input, gradient or input_gradient.",
)
@click.option(
    "--objective",
    metavar="TEXT",
    help="What gradients are the gradients of: fc[281], fc[maximum], fc[281] - fc[282]; without a "
    "layer in front of the brackets, of the model's result.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The .npz file to write; an existing file is replaced.",
)
@click.option(
    "--extractor",
    type=click.Choice([extractor.value for extractor in Extractor]),
    default=Extractor.AUTO.value,
    help="How to capture the layers. Default: auto.",
)
@click.option(
    "--dtype",
    type=click.Choice(SENT_DTYPES),
    help="The type of floating-point values. .npz has no bfloat16, so that is stored as float32.",
)
@click.option(
    "--reduce",
    "reduction",
    type=click.Choice([reduction.value for reduction in Reduction]),
    default=Reduction.NONE.value,
    help="The reduction to apply to each layer. Default: none.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Items in one forward pass.",
)
@local_model_options
def extract(
    model: str,
    images: tuple[str, ...],
    arrays: tuple[str, ...],
    given_texts: tuple[str, ...],
    texts_file: Path | None,
    truncation: str,
    recordings: tuple[str, ...],
    layers: tuple[str, ...],
    objective: str | None,
    output: Path,
    extractor: str,
    dtype: str | None,
    reduction: str,
    batch_size: int,
    server: ServerAddress | None,
    **flags: Any,
) -> None:
    """Write layers of images, texts, audio or arrays to an .npz file: one array for each layer.

    Batches are joined along each layer's batch dimension, which was measured when the model was
    loaded. For most layers it is the first, so there is one row per image; for layers such as
    [L, B, D] it is the second.

    MODEL is a torchvision model (resnet18), a Hugging Face model (hf:FOLDER), a TorchScript file
    (net.pt) or a factory (package.module:function). With --server it is the name of a model on that
    server. Images are JPEG, PNG or WebP files.

    \b
    Examples:
      layertap extract resnet18 *.jpg -l layer4 --reduce global_average_pool -o features.npz
      layertap extract resnet18 cat.jpg -l layer1 -l avgpool:input=before -o cat.npz
      layertap extract resnet18 cat.jpg -l layer1 -o cat.npz --server 127.0.0.1:8001
      layertap extract resnet18 cat.jpg -l layer4:gradient --objective "fc[281]" -o cat.npz
      layertap extract hf:nets/bert --text "A cat." -l "encoder.layer.*" -o states.npz
      layertap extract hf:nets/wav2vec2 --audio a.wav -l output.last_hidden_state -o a.npz
      layertap extract nets:bert --input input_ids=ids.npy --input attention_mask=mask.npy \\
          -l encoder -o texts.npz
      python -c "import numpy; print(numpy.load('cat.npz')['layer1'].shape)"
    """
    refuse_with_server(server, flags)
    selections = [
        replace(LayerSelection.parse(text), reduction=Reduction(reduction), dtype=dtype or "")
        for text in layers
    ]
    texts = [*given_texts, *_lines(texts_file)]
    items = _items(images, arrays, texts, recordings, Truncation(truncation))
    _check_output(output)
    from layertap.cli.npz import Columns
    from layertap.cli.render import Stderr, show_features

    terminal = Stderr()
    wanted = _Wanted(selections, Extractor(extractor), parse_objective(objective))
    opened = _remote(server, model, wanted) if server else _local(terminal, model, wanted, flags)
    ragged = Reduction(reduction) in {Reduction.TOKENS, Reduction.WORDS}
    with opened as source, terminal.counting(items.noun, len(items)) as bar:
        columns = Columns(lambda: OBJECTIVE_AXES | batch_axes(source.describe(), selections))
        for begin in range(0, len(items), batch_size):
            size = min(batch_size, len(items) - begin)
            with items.naming(begin):
                taken = source.ask(items.batch(begin, size))
                columns.add(*taken, 1 if ragged else size)
            bar.advance(bar.task_ids[0], size)
    columns.save(output)
    show_features(columns.rows())


class _Wanted(NamedTuple):
    """What to extract from each batch."""

    selections: list[LayerSelection]
    extractor: Extractor
    objective: Objective | None


class _Taken(NamedTuple):
    """The layers of a batch by name, and the extractor that captured them."""

    arrays: Mapping[str, np.ndarray]
    extractor: Extractor


@dataclass(frozen=True)
class _Source:
    """A model: `ask` extracts layers of a batch, `describe` describes the model."""

    ask: Callable[[InputLike], _Taken]
    describe: Callable[[], ModelDescription]


def batch_axes(
    description: ModelDescription, selections: Sequence[LayerSelection]
) -> dict[str, int | None]:
    """Return the batch dimension of each output.

    It is None if there is no such dimension: none grows with the batch, several do, or the items
    are interleaved along it.
    """
    axes: dict[str, int | None] = {}
    for selection in selections:
        if selection.capture is Capture.GRADIENT and selection.layer.startswith(INPUTS):
            names = [f"{prefix}.{each.name}" for each in description.inputs for prefix in INPUTS]
            axes.update((selection.name_for(name), 0) for name in names)
        glob = Glob(selection.layer)
        for layer in description.layers:
            if layer.name == selection.layer or glob.matches(layer.name):
                plain = selection.reduction is Reduction.NONE and not selection.method.is_map
                axis = _batch_axis(layer.values.get(selection.capture.side)) if plain else 0
                axes[selection.name_for(layer.name)] = axis
    return {**axes, **{f"{name}.gap": 0 for name in axes}} if _integrates(selections) else axes


def _integrates(selections: Sequence[LayerSelection]) -> bool:
    return any(each.method is Method.INTEGRATED_GRADIENTS for each in selections)


def _batch_axis(value: ValueDescription | None) -> int | None:
    if value is None:
        return None
    grown = [axis for axis, dim in enumerate(value.shape) if dim.batch]
    return None if value.interleaved or value.dynamic or len(grown) != 1 else grown[0]


def _items(
    images: Sequence[str],
    arrays: Sequence[str],
    texts: Sequence[str],
    recordings: Sequence[str],
    truncation: Truncation,
) -> Items:
    if sum(map(bool, (images, arrays, texts, recordings))) != 1:
        raise click.UsageError(
            "give one of: IMAGEs, texts by --text and --texts, --audio, or --input"
        )
    if images:
        return ImageItems(images)
    if recordings:
        return AudioItems(recordings)
    return TextItems(texts, truncation) if texts else ArrayItems(parse_array_files(arrays))


def _check_output(output: Path) -> None:
    """Check before loading a model what would otherwise fail after it."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InvalidInputError(f"output {output}: no such folder {output.parent}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"output {output}: the folder {output.parent} can't be written to")


def _lines(file: Path | None) -> list[str]:
    """Return the texts of a file, one on each line that is not empty."""
    if file is None:
        return []
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInputError(f"texts {file}: {reason}") from error
    return [line for line in lines if line.strip()]


@contextmanager
def _remote(server: ServerAddress, model: str, wanted: _Wanted) -> Iterator[_Source]:
    from layertap.wire.descriptions import description_from_proto

    with server.client() as client:

        def ask(given: InputLike) -> _Taken:
            features = client.extract(
                model,
                given,
                wanted.selections,
                extractor=wanted.extractor,
                objective=wanted.objective,
            )
            return _Taken(features, features.extractor)

        yield _Source(ask, lambda: description_from_proto(client.describe_model(model)))


@contextmanager
def _local(
    terminal: Stderr,
    source: str,
    wanted: _Wanted,
    flags: dict[str, Any],
) -> Iterator[_Source]:
    with terminal.busy(f"loading {source}"):
        model = local_model(source, flags)
    with model:
        if assumed := model.host.model.assumptions():
            terminal.say(assumed, logging.WARNING)

        def ask(given: InputLike) -> _Taken:
            features = model.extract(
                given,
                wanted.selections,
                extractor=wanted.extractor,
                objective=wanted.objective,
            )
            return _Taken(features.numpy(), features.extractor)

        yield _Source(ask, model.describe)
