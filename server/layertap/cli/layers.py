"""``layertap layers``: what can be extracted from a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from layertap.cli.options import embedded_engine, local_model_options, refuse_with_server

if TYPE_CHECKING:
    from layertap.cli.connection import ServerAddress
    from layertap.v1 import catalogue_pb2, feature_service_pb2

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
    help="Print the DescribeModelResponse as JSON, graph nodes included.",
)
@local_model_options
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

    MODEL is a torchvision model (resnet18), a timm model (timm:convnext_tiny), a TorchScript file
    (net.pt) or a factory (package.module:function). With --server it is the name of a model on that
    server.

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
    description = _ask(server, model) if server else _measure(model, flags)
    chosen = _chosen(description, glob, everything or as_json)
    if as_json:
        from google.protobuf.json_format import MessageToJson

        del description.layers[:]
        description.layers.extend(chosen)
        click.echo(MessageToJson(description, preserving_proto_field_name=True))
        return
    from layertap.cli.render import show_layers

    show_layers(
        description.model,
        chosen,
        description.refused_plans,
        tree=sys.stdout.isatty() if tree is None else tree,
    )


def _ask(server: ServerAddress, model: str) -> feature_service_pb2.DescribeModelResponse:
    with server.client() as client:
        return client.describe_model(model)


def _measure(model: str, flags: dict[str, Any]) -> feature_service_pb2.DescribeModelResponse:
    from layertap.cli.render import Stderr
    from layertap.services.convert import description_to_proto

    with Stderr().busy(f"measuring {model}"):
        engine, name = embedded_engine(model, flags)
    try:
        return description_to_proto(engine.host(name))
    finally:
        engine.close()


def _chosen(
    description: feature_service_pb2.DescribeModelResponse, glob: str | None, everything: bool
) -> list[catalogue_pb2.Layer]:
    from layertap.errors import LayerNotFoundError
    from layertap.selection import Glob
    from layertap.v1 import catalogue_pb2

    shown = list(description.layers)
    if not everything:
        shown = [layer for layer in shown if layer.kind != catalogue_pb2.LAYER_KIND_NODE]
    if glob is not None:
        pattern = Glob(glob)
        shown = [layer for layer in shown if pattern.matches(layer.name)]
        if not shown:
            raise LayerNotFoundError(
                f"glob {glob!r} matches no layer; `*` stays within a path's component, `**` "
                f"crosses them, --all shows graph nodes too"
            )
    return shown
