"""``layertap explain``: where in an image a layer decides for a score."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layertap.cli.changes import changes_of, described_changes, set_option
from layertap.cli.options import local_model, local_model_options, refuse_with_server
from layertap.errors import InvalidInputError
from layertap.objective import parse_objective
from layertap.selection import Capture, LayerSelection, MapForm, Method

if TYPE_CHECKING:
    import numpy as np

    from layertap.cli.connection import ServerAddress

__all__ = ["explain"]

_FORMS = {".png": MapForm.OVERLAY, ".npy": MapForm.RESIZED}
_METHODS = {method.value.replace("_", "-"): method for method in Method if method.is_map}
_RESULT = "[argmax]"
_BLANK = (
    "the map is 0 everywhere: no place of this layer counts for the score. After the last block of "
    "a vision transformer, for example, only the class token counts; take an earlier layer"
)


@click.command(short_help="Show where in an image a layer decides for a score.")
@click.argument("model", metavar="MODEL")
@click.argument("image", metavar="IMAGE", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "-l",
    "--layer",
    required=True,
    metavar="LAYER[:input]",
    help="The layer whose map to show: one with a grid, such as the last block of a network.",
)
@click.option(
    "--objective",
    metavar="TEXT",
    help="The score: fc[281], fc[argmax], fc[281] - fc[282]; without a layer in front of the "
    f"brackets, of the model's result. Default: {_RESULT}. eigen-cam takes none.",
)
@click.option(
    "--method",
    type=click.Choice(list(_METHODS)),
    default="grad-cam",
    show_default=True,
    help="How the map is made.",
)
@set_option
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The file to write: .png for the map as colours over the image, .npy for its numbers "
    "[H, W] at the size of the model's input.",
)
@local_model_options()
def explain(
    model: str,
    image: str,
    layer: str,
    objective: str | None,
    method: str,
    changes: tuple[str, ...],
    output: Path,
    server: ServerAddress | None,
    **flags: Any,
) -> None:
    """Show where in an image a layer decides for a score, as a class activation map.

    In a picture, red is where the layer speaks for the score and blue where it speaks against it,
    over the image as the model was given it: resized, cropped and in gray.

    MODEL is a torchvision model (resnet18), a Hugging Face model (hf:FOLDER) or a factory
    (package.module:function). With --server it is the name of a model on that server.

    \b
    Examples:
      layertap explain resnet18 cat.jpg --layer layer4 -o overlay.png
      layertap explain resnet18 cat.jpg --layer layer4 --objective "fc[281]" -o overlay.png
      layertap explain vit_b_16 cat.jpg --layer encoder.layers.encoder_layer_10 \\
          --method layer-cam -o overlay.png
      layertap explain resnet18 cat.jpg --layer layer4 --set layer3:channel=0..64:zero \\
          -o without.png
      layertap explain resnet18 cat.jpg --layer layer4 -o map.npy --server 127.0.0.1:8001

    Exit codes: 0 success, 1 failure, 2 a wrong command line.
    """
    refuse_with_server(server, flags)
    chosen = _METHODS[method]
    if objective is not None and not chosen.takes_gradient:
        raise click.UsageError(f"--objective: {method} takes none")
    aim = (objective or _RESULT) if chosen.takes_gradient else None
    parse_objective(aim)
    interventions = changes_of(changes)
    selection = _selection(layer, chosen, _form(output))
    from layertap.cli.render import Stderr

    terminal = Stderr()
    found: Mapping[str, np.ndarray]
    if server:
        with server.client() as client:
            found = client.extract(
                model, image, selection, objective=aim, interventions=interventions
            )
            blank = _write(output, found, changes)
    else:
        with terminal.busy(f"loading {model}"):
            local = local_model(model, flags)
        with local:
            if assumed := local.host.model.assumptions():
                terminal.say(assumed, logging.WARNING)
            found = local.extract(
                image, selection, objective=aim, interventions=interventions
            ).numpy()
            blank = _write(output, found, changes)
    if blank:
        terminal.say(_BLANK, logging.WARNING)


def _selection(layer: str, method: Method, form: MapForm) -> LayerSelection:
    asked = LayerSelection.parse(layer)
    if asked != LayerSelection(asked.layer, asked.capture) or asked.capture.is_gradient:
        raise click.UsageError(f"--layer: got {layer!r}, expected LAYER or LAYER:input")
    capture = asked.capture
    if method.takes_gradient:
        capture = Capture.INPUT_GRADIENT if capture is Capture.INPUT else Capture.GRADIENT
    return replace(asked, capture=capture, method=method, map_form=form, alias="map")


def _form(output: Path) -> MapForm:
    if output.suffix.lower() not in _FORMS:
        raise InvalidInputError(
            f"output: got {output.name!r}, expected a name that ends in {' or '.join(_FORMS)}"
        )
    if not output.parent.is_dir():
        raise InvalidInputError(f"output: there is no folder {str(output.parent)!r}")
    return _FORMS[output.suffix.lower()]


def _write(output: Path, found: Mapping[str, np.ndarray], changes: Sequence[str]) -> bool:
    """Write the map, and say what it explains and what interventions changed.

    Returns:
        Whether the map is 0 everywhere, so that a picture has no colour.
    """
    import numpy as np

    from layertap.cli.png import png

    made = found["map"][0]
    if output.suffix.lower() == ".png":
        output.write_bytes(png(made))
    else:
        with output.open("wb") as file:
            np.save(file, made)
    words = [f"{output}: {made.shape[1]} x {made.shape[0]}"]
    if "objective.value" in found:
        words.append(f"objective {float(found['objective.value'][0]):.4g}")
    if "objective.index" in found:
        place = ",".join(map(str, found["objective.index"][0].tolist()))
        words.append(f"at index {place}")
    click.echo(", ".join(words))
    for line in described_changes(changes, found):
        click.echo(line)
    # The largest magnitude of a map always has a colour, so a gray picture is one of zeros.
    return not made.any() if made.ndim == 2 else bool((made == made[..., :1]).all())
