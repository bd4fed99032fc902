"""``layertap serve``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layertap.cli.options import (
    IMAGE_FLAGS,
    device,
    find_local_modules,
    image_options,
    input_options,
    item_shape,
    seed,
    weights_key,
)
from layertap.cli.secret_options import secret_options
from layertap.errors import LayertapError

if TYPE_CHECKING:
    from layertap.app.config import ServerConfig

__all__ = ["serve"]

PORTS = click.IntRange(0, 65535)
METRICS_PORTS = click.IntRange(-1, 65535)
MODEL_FLAGS = (
    *("weights", "weights_key", "seed", "item_shape", "precision", "channels_last", "layers"),
    *("max_batch_size", "max_queue_delay_us", "input_dtype", "free_dims"),
    *IMAGE_FLAGS,
)


def _numbers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"got {value!r}, expected numbers such as 1000,1001")
    return tuple(map(int, parts))


def _mode(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch("0?[0-7]{3}", value):
        raise click.BadParameter(f"got {value!r}, expected octal digits such as 0660")
    return value


@click.command(short_help="Serve models over gRPC.")
@click.argument("models", nargs=-1, metavar="[[NAME=]MODEL]...")
@click.option(
    "--weights",
    metavar="W",
    help="DEFAULT (the default), a torchvision name such as IMAGENET1K_V1, a file or folder, or "
    "random.",
)
@weights_key
@click.option(
    "--layers",
    metavar="A,B:input",
    help="Layers to compile and warm at the start; any other can be asked for as well.",
)
@seed
@item_shape
@input_options
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="The type to compute in; default: the weights' own.",
)
@click.option(
    "--channels-last", is_flag=True, default=None, help="Lay convolutions' weights out that way."
)
@image_options
@device
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Items of several requests that may share a forward pass; default 1: each runs alone.",
)
@click.option(
    "--max-queue-delay-us",
    type=click.IntRange(min=0),
    metavar="N",
    help="Microseconds that a request may be held back for others to join it; default 0.",
)
@click.option(
    "--host",
    help="The address to listen on; default 127.0.0.1, this machine only. unix:/path listens on a "
    "Unix socket instead.",
)
@click.option(
    "--unix-socket", type=click.Path(), metavar="PATH", help="A Unix socket to listen on as well."
)
@click.option(
    "--unix-socket-mode",
    metavar="OCTAL",
    callback=_mode,
    help="The permissions of the socket's file; default 0600, this user only.",
)
@click.option(
    "--max-connection-age",
    "max_connection_age_seconds",
    type=click.FloatRange(min=0),
    metavar="S",
    help="Seconds, give or take a tenth, after which clients make another connection, so that a "
    "load balancer can spread them again; default 0: never.",
)
@click.option(
    "--max-connection-age-grace",
    "max_connection_age_grace_seconds",
    type=click.FloatRange(min=0),
    metavar="S",
    help="Seconds that calls and streams of such a connection get to finish; default 0: no end.",
)
@click.option("--port", type=PORTS, help="The port; default 8001, 0 takes a free one.")
@click.option(
    "--metrics-port",
    type=METRICS_PORTS,
    help="The port of the Prometheus page; default 8002, 0 takes a free one, -1 shows none.",
)
@click.option(
    "--mode",
    type=click.Choice(["latency", "throughput"]),
    help="latency (the default) gives all CPUs to one request, throughput one CPU to each.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPUs to compute with: those of one request in latency mode, the requests that run at "
    "once in throughput mode; default: as many as the process may use.",
)
@click.option(
    "--tf32/--no-tf32",
    default=None,
    help="Let CUDA devices compute float32 convolutions and matrix products in TF32: faster, and "
    "as exact as float16; default --no-tf32.",
)
@click.option(
    "--plan-cache",
    metavar="DIR",
    help="Where compiled plans are kept for the next start; default auto, the user's cache folder; "
    "off keeps none.",
)
@click.option(
    "--grace",
    "grace_seconds",
    type=click.FloatRange(min=0),
    metavar="S",
    help="Seconds that admitted calls get to finish after SIGTERM; default 10.",
)
@click.option(
    "--keep-memory/--no-keep-memory",
    default=None,
    help="Keep memory freed by a reply for the next one (the default); large ones gain most.",
)
@click.option(
    "--keep-memory-mib",
    type=click.IntRange(min=1),
    metavar="N",
    help="MiB of free memory that may be kept; default 1024, less in a small container.",
)
@click.option(
    "--shared-memory-mib",
    type=click.IntRange(min=0),
    metavar="N",
    help="MiB that may be shared with clients of this machine; default 1024, less in a small "
    "container; 0 for none.",
)
@click.option(
    "--shared-memory-lease",
    "shared_memory_lease_seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Seconds that such a client may keep what was lent to it; default 60.",
)
@secret_options
@click.option(
    "--log-format",
    type=click.Choice(["human", "json"]),
    help="human (the default), or json: a JSON object a line.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="The least that is logged; default warning, info logs every extraction.",
)
@click.option(
    "--otel-endpoint",
    metavar="URL",
    help="Send OpenTelemetry traces there (OTLP over gRPC), e.g. http://127.0.0.1:4317; the OTEL_* "
    "environment variables work too. Needs layertap[otel].",
)
@click.option(
    "--strict",
    is_flag=True,
    default=None,
    help="End where a model can't be loaded at the start, instead of serving the others.",
)
@click.option(
    "--admin", is_flag=True, default=None, help="Serve AdminService: `layertap reload` needs it."
)
@click.option(
    "--watch",
    is_flag=True,
    default=None,
    help="Reload when the configuration's or a model's file changes, as SIGHUP does.",
)
@click.option(
    "--allow-client-shm",
    is_flag=True,
    default=None,
    help="Let clients of this machine name shared memory for inputs and outputs (Triton's system "
    "shared memory).",
)
@click.option(
    "--client-shm-uids",
    metavar="N,N",
    callback=_numbers,
    help="Users whose shared memory is taken besides that of the server's own.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(),
    metavar="FILE",
    help="A layertap.toml with [server], [limits] and [[models]]; flags win over it.",
)
def serve(models: tuple[str, ...], config_file: str | None, **flags: Any) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C.

    MODEL is a torchvision model (resnet18), a timm model (timm:convnext_tiny), a TorchScript file
    (net.pt) or a factory (package.module:function). The flags of models hold for every MODEL; a
    file given with --config can tell them apart.

    \b
    Examples:
      layertap serve resnet18
      layertap serve resnet18 --weights random --layers layer1,avgpool:input
      layertap serve a=nets/a.pt b=mynets:build --device cuda --port 9001
      layertap serve --config layertap.toml --port 0

    Health (grpc.health.v1) is NOT_SERVING until the models are loaded and their layers are warm;
    each model has its own. SIGHUP reads the configuration and changed weights again, without a
    failed request. A second SIGTERM ends the process at once.
    """
    if not models and config_file is None:
        raise click.UsageError("nothing to serve: name a MODEL, or a file with --config")
    # The answer to a wrong command line should not wait for torch.
    from layertap.app.logs import (
        LogNarrator,
        configure_logs,
        log_everything_as_json,
        set_log_level,
    )

    as_json = flags["log_format"] == "json"
    if as_json:  # Before torch is imported, which may have something to say.
        log_everything_as_json(flags["log_level"] or "warning")

    from layertap.app import lifecycle
    from layertap.app.config import ServerConfig, with_flags
    from layertap.app.config_file import load_config
    from layertap.cli.render import Stderr

    find_local_modules()
    if flags["layers"] is not None:
        flags["layers"] = tuple(flags["layers"].split(","))
    model_flags = {name: flags.pop(name) for name in MODEL_FLAGS}

    def read() -> ServerConfig:
        file = load_config(config_file) if config_file else ServerConfig()
        return with_flags(file, models, model_flags, flags)

    try:
        config = read()
    except LayertapError as error:
        if not as_json:
            raise
        LogNarrator().say(f"error: {error}")
        raise SystemExit(1) from None
    level = config.server.log_level
    if config.server.log_format != "json":
        configure_logs("human", level)
    elif as_json:
        set_log_level(level)
    else:
        log_everything_as_json(level)
    narrator = LogNarrator() if config.server.log_format == "json" else Stderr()
    path = Path(config_file) if config_file else None
    raise SystemExit(lifecycle.serve(config, narrator, read, path))
