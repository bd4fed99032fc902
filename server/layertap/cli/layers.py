"""``layertap layers``: what can be extracted from a model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from layertap.cli.options import local_model, local_model_options, refuse_with_server

if TYPE_CHECKING:
    from layertap.cli.connection import ServerAddress
    from layertap.description import LayerDescription, ModelDescription

__all__ = ["layers"]


@click.command(short_help="List a model's layers.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--glob",
    metavar="PATTERN",
    help="List only names that match; `*` stops at dots, `**` does not.",
)
@click.option(
    "--all", "everything", is_flag=True, help="Also list graph nodes, which are not modules."
)
@click.option(
    "--tree/--flat",
    default=None,
    help="Show a tree of modules (the default on a terminal) or a flat table (otherwise).",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the DescribeModelResponse as JSON, including graph nodes.",
)
@local_model_options()
def layers(
    model: str,
    glob: str | None,
    everything: bool,
    tree: bool | None,
    as_json: bool,
    server: ServerAddress | None,
    **flags: Any,
) -> None:
    """List a model's layers, as measured by running the model.

    MODEL is a torchvision model (resnet18), a timm model (timm:convnext_tiny), a Hugging Face model
    (hf:FOLDER), a TorchScript file (net.pt) or a factory (package.module:function). With --server
    it is the name of a model on that server.

    \b
    Examples:
      layertap layers resnet18 --weights random
      layertap layers resnet18 --flat --glob 'layer*.*.conv1'
      layertap layers resnet18 --json | jq '.layers[].name'
      layertap layers resnet18 --server 127.0.0.1:8001

    B in a shape is the batch size. Bytes are those of one item. The stride is the input's height
    divided by the output's. Each letter stands for an extractor that can serve the layer.
    """
    refuse_with_server(server, flags)
    description = _described(server, model) if server else _measured(model, flags)
    if as_json:
        from layertap.wire.description_json import description_to_json

        chosen = _chosen(description.layers, glob)
        click.echo(json.dumps(description_to_json(replace(description, layers=chosen)), indent=2))
        return
    from layertap.cli.render import show_layers

    shown = tuple(each for each in description.layers if everything or not each.is_node)
    chosen = _chosen(shown, glob)
    show_layers(description, chosen, tree=sys.stdout.isatty() if tree is None else tree)


def _described(server: ServerAddress, model: str) -> ModelDescription:
    from layertap.wire.descriptions import description_from_proto

    with server.client() as client:
        return description_from_proto(client.describe_model(model))


def _measured(model: str, flags: dict[str, Any]) -> ModelDescription:
    from layertap.cli.render import Stderr

    with Stderr().busy(f"measuring {model}"):
        local = local_model(model, flags)
    with local:
        return local.describe()


def _chosen(layers: tuple[LayerDescription, ...], glob: str | None) -> tuple[LayerDescription, ...]:
    """Return the layers whose names match."""
    from layertap.errors import LayerNotFoundError
    from layertap.selection import Glob

    if glob is None:
        return layers
    pattern = Glob(glob)
    chosen = tuple(layer for layer in layers if pattern.matches(layer.name))
    if not chosen:
        raise LayerNotFoundError(
            f"glob {glob!r} matches no layer; `*` stays within a path's component, `**` crosses "
            f"them, --all shows graph nodes too"
        )
    return chosen
