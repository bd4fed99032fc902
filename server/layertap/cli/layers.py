"""``layertap layers``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from layertap.cli.options import embedded_engine, local_model_options, refuse_with_server

if TYPE_CHECKING:
    from layertap.cli.connection import ServerAddress
    from layertap.v1 import catalogue_pb2, feature_service_pb2

__all__ = ["layers"]


@click.command(short_help="List what a model has to offer.")
@click.argument("model", metavar="MODEL")
@click.option("--glob", metavar="PATTERN", help="Only names that match; `**` crosses dots.")
@click.option("--all", "everything", is_flag=True, help="Graph nodes that are no modules, too.")
@click.option(
    "--tree/--flat",
    default=None,
    help="A tree of modules, the default on a terminal, or a table, the default elsewhere.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="The DescribeModelResponse as JSON; has graph nodes always.",
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
    """List a model's layers, as measured by running it.

    MODEL is a torchvision model (resnet18), a timm model (timm:convnext_tiny), a TorchScript file
    (net.pt) or a factory (package.module:function); with --server, the name of a served model.

    \b
    Examples:
      layertap layers resnet18 --weights random
      layertap layers resnet18 --flat --glob 'layer*.*.conv1'
      layertap layers resnet18 --json | jq '.layers[].name'
      layertap layers resnet18 --server 127.0.0.1:8001

    B in a shape is the batch, bytes are for one item, the stride is the input's height over the
    output's. The letters tell which extractors serve the layer.
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
