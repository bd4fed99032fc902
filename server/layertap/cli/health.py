"""``layertap health``."""

from __future__ import annotations

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from layertap.client.client import TARGET

__all__ = ["health"]

Status = health_pb2.HealthCheckResponse


@click.command(short_help="Ask a server whether it is ready.")
@click.argument("target", default=TARGET, metavar="[HOST:PORT]")
@click.option(
    "--service",
    default="",
    metavar="NAME",
    help="Ask for one model by its name, or for layertap.v1.FeatureService; default: the server.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    metavar="S",
    help="Seconds to wait for the answer; default 5.",
)
def health(target: str, service: str, timeout: float) -> None:
    """Ask the server at HOST:PORT (default 127.0.0.1:8001) for its health, by grpc.health.v1.

    Exit code 0 if it is SERVING, else 1: a probe for containers and scripts.

    \b
    Examples:
      layertap health
      layertap health 127.0.0.1:9001 --service resnet18 --timeout 1
    """
    try:
        with grpc.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
    except grpc.RpcError as error:
        raise click.ClickException(f"{target}: {error.code().name}: {error.details()}") from None
    print(Status.ServingStatus.Name(reply.status))
    if reply.status != Status.SERVING:
        raise SystemExit(1)
