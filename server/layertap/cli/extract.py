"""``layertap extract``: layers of data sets, written to files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from layertap.cli.changes import changes_of, set_option
from layertap.cli.options import local_model, local_model_options, refuse_with_server
from layertap.errors import InvalidInputError
from layertap.objective import parse_objective
from layertap.projection import Projection
from layertap.selection import SENT_DTYPES, Extractor, LayerSelection, Reduction
from layertap.texts import Truncation

if TYPE_CHECKING:
    from layertap.cli.connection import ServerAddress
    from layertap.cli.render import Stderr
    from layertap.dataset.runners import Runner
    from layertap.dataset.sources import Source
    from layertap.intervention import Intervention

__all__ = ["extract"]

_FORMATS = ("npz", "npy", "safetensors", "parquet", "lance", "zarr", "hdf5")
_SOME_FAILED = 3
_INTERRUPTED = 130


class _Bytes(click.ParamType[int]):
    """A number of bytes with an optional unit: ``500M``, ``2G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        digits, unit = (value[:-1], value[-1:].upper()) if value[-1:].isalpha() else (value, "")
        power = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}.get(unit)
        if power is None or not digits.isdecimal() or not int(digits):
            self.fail(f"got {value!r}, expected a number with K, M, G or T, such as 2G", param, ctx)
        return int(digits) << (10 * power)


class _Part(click.ParamType["tuple[int, int]"]):
    """One of several parts: ``2/8``."""

    name = "part"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return the number of the part and the number of parts."""
        if isinstance(value, tuple):
            return value
        number, _, count = value.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            self.fail(
                f"got {value!r}, expected the part and the number of parts, such as 2/8", param, ctx
            )
        return int(number), int(count)


@click.command(short_help="Write layers of images, texts, audio or arrays to files.")
@click.argument("model", metavar="MODEL")
@click.argument("items", nargs=-1, metavar="[INPUT...]")
@click.option(
    "--input",
    "arrays",
    multiple=True,
    metavar="[NAME=]FILE.npy",
    help="An array with an item in each row, in place of INPUTs. Give one for each input of the "
    "model; the name may be left out for the only input that it needs.",
)
@click.option(
    "--text",
    "given_texts",
    multiple=True,
    metavar="TEXT",
    help="A text, in place of INPUTs. May be given several times.",
)
@click.option(
    "--texts",
    "texts_file",
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
    "--field",
    default="",
    metavar="NAME",
    help="The column of .parquet files, or the ending of the files to take from .tar files. "
    "Default: the one with images, arrays or texts.",
)
@click.option(
    "--audio",
    "recordings",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="A WAV or FLAC file, in place of INPUTs. May be given several times.",
)
@click.option(
    "-l",
    "--layer",
    "layers",
    multiple=True,
    required=True,
    metavar="LAYER[+LAYER]...[:CAPTURE][:OPTION=VALUE]...[=NAME]",
    help="A layer to write, or several whose channels follow one another. May be given several "
    "times, and may be a glob. CAPTURE is output, input, gradient or input_gradient. Options: "
    "reduce=REDUCTION, dtype=TYPE, around=3 (the mean of 3 x 3 places), resize=HxW, pool=HxW, "
    "project=@pca.npz, map=FORM. See docs/extraction.md.",
)
@click.option(
    "--objective",
    metavar="TEXT",
    help="What gradients are the gradients of: fc[281], fc[maximum], fc[281] - fc[282]; without a "
    "layer in front of the brackets, of the model's result.",
)
@set_option
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    metavar="PATH",
    help="The file or folder to write, or the address of an object store. Its suffix says the "
    "format: .npz, .npy, .safetensors, .parquet, .lance, .zarr, .h5.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(_FORMATS),
    help="The format of the output, whatever its suffix.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace an output that was made by another command."
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Whether an item that fails ends the run, or is left out and listed in "
    "PATH.failures.jsonl; the exit code is then 3.",
)
@click.option(
    "--extractor",
    type=click.Choice([extractor.value for extractor in Extractor]),
    default=Extractor.AUTO.value,
    help="How to capture the layers. Default: auto, which chooses once for the whole run; for more "
    "than 1,000 items it waits for a compiled program if there can be one.",
)
@click.option(
    "--variant",
    default="",
    metavar="NAME",
    help="How the program of the extractor is finished, such as channels_last; needs --extractor. "
    "Default: the usual way; with auto the fastest, if all passes take five minutes or more.",
)
@click.option(
    "--dtype",
    type=click.Choice(SENT_DTYPES),
    help="The type of floating-point values of layers without a :dtype of their own. Only "
    ".safetensors has bfloat16, which is stored as float32 otherwise.",
)
@click.option(
    "--reduce",
    "reduction",
    type=click.Choice([reduction.value for reduction in Reduction]),
    default=Reduction.NONE.value,
    help="The reduction of layers without a :reduce of their own. Default: none.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Items in one forward pass.",
)
@click.option(
    "--shard-items",
    type=click.IntRange(min=1),
    metavar="N",
    help="Items of one shard, the most that is computed again after a crash. Default: 64 MiB.",
)
@click.option(
    "--shard",
    "part",
    type=_Part(),
    default=(1, 1),
    metavar="I/N",
    help="Take the I-th of N equal parts of the items, from 1; each needs its own output.",
)
@click.option(
    "--memory",
    type=_Bytes(),
    default="1G",
    show_default=True,
    metavar="SIZE",
    help="Memory for items and rows that are not on the disk yet, such as 500M.",
)
@local_model_options(several=True)
def extract(
    model: str,
    items: tuple[str, ...],
    arrays: tuple[str, ...],
    given_texts: tuple[str, ...],
    texts_file: str | None,
    truncation: str,
    field: str,
    recordings: tuple[str, ...],
    layers: tuple[str, ...],
    objective: str | None,
    changes: tuple[str, ...],
    output: str,
    output_format: str | None,
    overwrite: bool,
    on_error: str,
    extractor: str,
    variant: str,
    dtype: str | None,
    reduction: str,
    batch_size: int,
    shard_items: int | None,
    part: tuple[int, int],
    memory: int,
    servers: list[ServerAddress],
    **flags: Any,
) -> None:
    """Write layers of images, texts, audio or arrays: a row for each item, in their order.

    INPUTs are image files (JPEG, PNG, WebP), folders of such, which are searched with all folders
    below, quoted globs, .wav and .flac files, .npy arrays with an item in each row, .txt files with
    a text in each line, .tar files of samples as WebDataset writes them, or .parquet files. @FILE
    is a file that lists INPUTs, one on each line, and - is the same from stdin. Each item has an
    id, such as its path, which is in the output too.

    MODEL is a torchvision model (resnet18), a Hugging Face model (hf:FOLDER), a TorchScript file
    (net.pt) or a factory (package.module:function). With --server it is the name of a model on that
    server.

    Run the same command again after a crash or Ctrl-C: it continues after the last whole shard, and
    the output has the same bytes as without the interruption. PATH.manifest.json says what the
    output was made of.

    \b
    Examples:
      layertap extract resnet18 photos -l layer4:reduce=global_average_pool -o features.npz
      layertap extract resnet18 "photos/**/*.jpg" -l layer2 -l layer4 -o features.zarr
      layertap extract resnet18 @list.txt -l avgpool -o features.parquet --on-error skip
      layertap extract resnet18 cat.jpg -l layer1 -l avgpool:input=before -o cat.npz
      layertap extract resnet18 cat.jpg -l layer1 -o cat.npz --server 127.0.0.1:8001
      layertap extract resnet18 cat.jpg -l layer4:gradient --objective "fc[281]" -o cat.npz
      layertap extract resnet18 cat.jpg -l fc --set layer4:channel=3:zero -o without_3.npz
      layertap extract hf:nets/bert --text "A cat." -l "encoder.layer.*" -o states.npz
      layertap extract hf:nets/wav2vec2 --audio a.wav -l output.last_hidden_state -o a.npz
      layertap extract nets:bert --input input_ids=ids.npy --input attention_mask=mask.npy \\
          -l encoder -o texts.npz
      python -c "import numpy; print(numpy.load('cat.npz')['layer1'].shape)"

    Exit codes: 0 success, 1 failure, 2 a wrong command line, 3 some items failed and were skipped,
    130 interrupted by Ctrl-C.
    """
    refuse_with_server(servers, flags)
    selections = [
        replace(
            selection,
            reduction=selection.reduction
            if selection.reduction is not Reduction.NONE
            else Reduction(reduction),
            dtype=selection.dtype or dtype or "",
        )
        for selection in (LayerSelection.parse(layer, Projection.load) for layer in layers)
    ]
    from layertap.cli.render import Stderr, show_outputs
    from layertap.dataset.run import check_output
    from layertap.dataset.run import extract as run

    # What can be wrong is reported before a model is loaded.
    check_output(output, output_format or "")
    given = _Given(items, arrays, given_texts, texts_file, recordings)
    source = _source(given, Truncation(truncation), field)
    terminal = Stderr()
    parse_objective(objective)
    asked = _Asked(objective or "", changes_of(changes))
    opened = _remote(servers, model, asked) if servers else _local(terminal, model, asked, flags)
    try:
        with opened as runner, terminal.progress(source.noun, len(source)) as report:
            outcome = run(
                runner,
                source,
                selections,
                output,
                format=output_format or "",
                extractor=extractor,
                variant=variant,
                on_error=on_error,  # type: ignore[arg-type] # one of click's choices
                batch_size=batch_size,
                shard_items=shard_items,
                part=part,
                memory=memory,
                overwrite=overwrite,
                report=report,
            )
    except KeyboardInterrupt:
        terminal.say("interrupted; run the same command again to continue", logging.WARNING)
        click.get_current_context().exit(_INTERRUPTED)
    show_outputs(outcome, changes)
    for text, each in zip(changes, outcome.changed, strict=False):
        if not each.changed:
            terminal.say(f"--set {text}: no element got another value", logging.WARNING)
    if outcome.failures:
        terminal.say(
            f"{len(outcome.failures)} of {len(source)} {source.noun} failed; "
            f"{output}.failures.jsonl says why",
            logging.WARNING,
        )
        click.get_current_context().exit(_SOME_FAILED)


class _Given(NamedTuple):
    """The items on the command line, of which one kind may be given."""

    inputs: Sequence[str]
    arrays: Sequence[str]
    texts: Sequence[str]
    texts_file: str | None
    recordings: Sequence[str]


class _Asked(NamedTuple):
    """What is asked of the model besides layers: an objective, if not empty, and interventions."""

    objective: str
    interventions: tuple[Intervention, ...]


def _source(given: _Given, truncation: Truncation, field: str) -> Source:
    from layertap.dataset.addresses import is_address
    from layertap.dataset.sources import (
        AudioContent,
        Files,
        NamedArrayRows,
        TextItems,
        gather,
        joined,
        lines_of,
    )

    has_texts = bool(given.texts) or given.texts_file is not None
    if sum(map(bool, (given.inputs, given.arrays, has_texts, given.recordings))) != 1:
        raise click.UsageError(
            "give one of: INPUTs, texts by --text and --texts, --audio, or --input"
        )
    if given.inputs:
        return gather(given.inputs, truncation, field)
    if given.recordings:
        for file in given.recordings:
            if not is_address(file) and not Path(file).is_file():
                raise InvalidInputError(f"audio {file}: no such file")
        return joined([Files(given.recordings, AudioContent())])
    if given.arrays:
        return joined([NamedArrayRows(_array_files(given.arrays))])
    texts = [(f"--text:{number}", text) for number, text in enumerate(given.texts, 1)]
    lines = [] if given.texts_file is None else lines_of(given.texts_file)
    return joined([TextItems([*texts, *lines], truncation)])


def _array_files(texts: Sequence[str]) -> dict[str, str]:
    """Return the paths of arrays by input, from ``NAME=FILE.npy`` or, for one input, ``FILE.npy``.

    Raises:
        InvalidInputError: A name is given twice, or is missing although there are several inputs.
    """
    files: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        name, file = (name, file) if equals else ("", text)
        if name in files:
            raise InvalidInputError(f"--input: got {name!r} twice, expected each input once")
        files[name] = file
    if len(files) > 1 and "" in files:
        raise InvalidInputError(
            f"--input: got {files['']!r} without a name, expected NAME=FILE.npy for each of several"
        )
    return files


@contextmanager
def _remote(servers: list[ServerAddress], model: str, asked: _Asked) -> Iterator[Runner]:
    from layertap.dataset.runners import RemoteRunner

    with ExitStack() as stack:
        clients = {each.target: stack.enter_context(each.client()) for each in servers}
        yield RemoteRunner(clients, model, asked.objective, interventions=asked.interventions)


@contextmanager
def _local(terminal: Stderr, source: str, asked: _Asked, flags: dict[str, Any]) -> Iterator[Runner]:
    from layertap.dataset.runners import LocalRunner

    with terminal.busy(f"loading {source}"):
        model = local_model(source, flags)
    with model:
        if assumed := model.host.model.assumptions():
            terminal.say(assumed, logging.WARNING)
        yield LocalRunner(model, *asked)
