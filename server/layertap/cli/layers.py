"""``layertap layers``: what can be extracted from a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from layertap.cli.options import local_model, local_model_options, refuse_with_server

if TYPE_CHECKING:
    from layertap.cli.connection import ServerAddress
    from layertap.description import ModelDescription
    from layertap.v1 import feature_service_pb2

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
    if as_json:
        response = _ask(server, model) if server else _response(model, flags)
        click.echo(_json(response, glob))
        return
    from layertap.cli.render import show_layers

    description = _described(server, model) if server else _measured(model, flags)
    chosen = _chosen([each for each in description.layers if everything or not each.is_node], glob)
    show_layers(description, chosen, tree=sys.stdout.isatty() if tree is None else tree)


def _ask(server: ServerAddress, model: str) -> feature_service_pb2.DescribeModelResponse:
    with server.client() as client:
        return client.describe_model(model)


def _described(server: ServerAddress, model: str) -> ModelDescription:
    from layertap.cli.described import described

    return described(_ask(server, model))


def _measured(model: str, flags: dict[str, Any]) -> ModelDescription:
    from layertap.cli.render import Stderr

    with Stderr().busy(f"measuring {model}"):
        local = local_model(model, flags)
    with local:
        return local.describe()


def _response(model: str, flags: dict[str, Any]) -> feature_service_pb2.DescribeModelResponse:
    """Measure a model, and return the same description that a server would send."""
    from layertap.services.convert import description_to_proto

    with local_model(model, flags) as local:
        return description_to_proto(local.host)


def _json(response: feature_service_pb2.DescribeModelResponse, glob: str | None) -> str:
    from google.protobuf.json_format import MessageToJson

    chosen = _chosen(list(response.layers), glob)
    del response.layers[:]
    response.layers.extend(chosen)
    return MessageToJson(response, preserving_proto_field_name=True)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


def _chosen(layers: list[N], glob: str | None) -> list[N]:
    """Return the layers whose names match."""
    from layertap.errors import LayerNotFoundError
    from layertap.selection import Glob

    if glob is None:
        return layers
    pattern = Glob(glob)
    chosen = [layer for layer in layers if pattern.matches(layer.name)]
    if not chosen:
        raise LayerNotFoundError(
            f"glob {glob!r} matches no layer; `*` stays within a path's component, `**` crosses "
            f"them, --all shows graph nodes too"
        )
    return chosen
