"""What a server can be told: the sections of ``layertap.toml``, and flags that win over them.

``layertap.app.config_file`` reads the file. Each field's type carries the words in which its error
message says what is expected.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from layertap.app.server import PORT, ServerOptions
from layertap.engine import Limits
from layertap.errors import ConfigError
from layertap.extraction.plan_cache import PlanCache
from layertap.models import ModelSpec
from layertap.selection import LayerSelection
from layertap.wire.memory import DEFAULT_MIB

__all__ = ["LimitsSection", "ModelSection", "ServerConfig", "ServerSection", "with_flags"]

_log = logging.getLogger(__name__)

MIB = 1 << 20
METRICS_OFF = -1
METRICS_PORT = 8002

Count = Annotated[int, Meta(ge=1, description="a number from 1")]
Mib = Annotated[int, Meta(ge=1, le=2047, description="a number of MiB, 1 to 2047")]
Text = Annotated[str, Meta(min_length=1, description="a text")]
Layers = Annotated[
    tuple[str, ...], Meta(description='a list of layers such as ["layer1", "avgpool:input"]')
]
Threads = Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="a number from 1")]
Sizes = Annotated[
    tuple[Annotated[int, Meta(ge=1)], ...] | None,
    Meta(description="sizes of one item without the batch, such as [3, 224, 224]"),
]


class ServerSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[server]``: where to listen and what to run on.

    Attributes:
        host: The address to bind, for calls and for metrics.
        port: Where calls are answered; 0 for a free port.
        metrics_port: Where the metrics page is; 0 for a free port, -1 for no page.
        device: ``auto`` is CUDA where there is a device, else the CPU.
        mode: ``latency`` gives all cores to one forward pass, ``throughput`` one core to each of
            as many passes as there are cores.
        threads: Cores of one forward pass in latency mode; PyTorch's own choice if not given.
        plan_cache: The folder where compiled plans of declared layers are kept for the next start;
            ``auto`` is the user's cache folder, ``off`` keeps none.
        plan_cache_mib: MiB that the folder may grow to.
        grace_seconds: How long admitted calls may take to finish once the server was asked to stop.
        keep_memory: Whether memory freed by a reply is kept for the next one.
        keep_memory_mib: MiB of free memory that may be kept.
        strict: Whether the server ends where one model can't be loaded at the start; else it
            serves the others.
        admin: Whether ``layertap.v1.AdminService`` is served.
        watch: Whether changed files are reloaded without being asked to.
    """

    host: Text = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="0 for a free port, to 65535")] = PORT
    metrics_port: Annotated[
        int, Meta(ge=-1, le=65535, description="-1 for no metrics, 0 for a free port, to 65535")
    ] = METRICS_PORT
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="'auto', 'cpu' or 'cuda'")
    ] = "auto"
    mode: Annotated[
        Literal["latency", "throughput"], Meta(description="'latency' or 'throughput'")
    ] = "latency"
    threads: Threads = None
    plan_cache: Annotated[str, Meta(min_length=1, description="a folder, 'auto' or 'off'")] = "auto"
    plan_cache_mib: Count = 2048
    grace_seconds: Annotated[float, Meta(ge=0, description="seconds from 0")] = 10.0
    keep_memory: Annotated[bool, Meta(description="true or false")] = True
    keep_memory_mib: Annotated[int, Meta(ge=1, description="a number of MiB from 1")] = DEFAULT_MIB
    strict: Annotated[bool, Meta(description="true or false")] = False
    admin: Annotated[bool, Meta(description="true or false")] = False
    watch: Annotated[bool, Meta(description="true or false")] = False

    def options(self) -> ServerOptions:
        """Return how to listen."""
        return ServerOptions(self.host, self.port)

    def compute(self, device: str) -> tuple[int, int | None]:
        """Return (forward passes at once, cores of one; None leaves it to PyTorch).

        Raises:
            ConfigError: For throughput mode on CUDA, or with a number of threads.
        """
        if self.mode == "latency":
            return 1, self.threads
        if device != "cpu":
            raise ConfigError(
                f"mode: got 'throughput' on {device}, where one pass fills the device; "
                f"expected 'latency'"
            )
        if self.threads is not None:
            raise ConfigError(
                f"threads: got {self.threads} with mode 'throughput', which computes each pass on "
                f"one core; expected none"
            )
        return len(os.sched_getaffinity(0)), 1

    def plans(self) -> PlanCache | None:
        """Return where compiled plans are kept; raise ConfigError for a folder that won't do.

        Without a folder of the user's own, as in some containers, ``auto`` keeps none.
        """
        if self.plan_cache == "off":
            return None
        most = self.plan_cache_mib * MIB
        if self.plan_cache != "auto":
            return PlanCache(Path(self.plan_cache).expanduser(), most)
        try:
            return PlanCache(_user_cache(), most)
        except (ConfigError, RuntimeError) as error:  # RuntimeError: the user has no home.
            _log.warning("compiled plans are not kept: %s", error)
            return None


class LimitsSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[limits]``: what a request may ask for, as in ``layertap.engine.Limits``.

    Attributes:
        request_mib: MiB of one request message.
        reply_mib: MiB of one reply message; protobuf itself ends below 2048.
        batch: Items of one request.
        pixels: Pixels of one encoded image.
        layers: Selections of one request, and layers that they match.
        pending: Requests that wait for a compute thread.
        plans: Plans that are kept besides the declared ones.
    """

    request_mib: Mib = Limits().request_bytes // MIB
    reply_mib: Mib = Limits().reply_bytes // MIB
    batch: Count = Limits().batch
    pixels: Count = Limits().pixels
    layers: Count = Limits().layers
    pending: Count = Limits().pending
    plans: Count = Limits().plans

    def limits(self) -> Limits:
        """Return the engine's own form, in bytes."""
        fields = msgspec.structs.asdict(self)
        request_bytes, reply_bytes = fields.pop("request_mib") * MIB, fields.pop("reply_mib") * MIB
        return Limits(request_bytes=request_bytes, reply_bytes=reply_bytes, **fields)


class ModelSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[models]]``: one model; the fields of ``layertap.models.ModelSpec`` and its layers.

    Attributes:
        source: A torchvision model, a TorchScript file or a factory ``package.module:function``.
        name: What requests call it; derived from the source if empty.
        weights: ``DEFAULT``, a torchvision weights name, a file, or ``random``.
        seed: Seeds random weights.
        item_shape: Sizes of one item without the batch.
        precision: ``float32``, ``float16`` or ``bfloat16``; the weights' own if empty.
        channels_last: Whether convolutions' weights are laid out with channels last.
        layers: Layers to compile and warm before the server reports itself as ready.
        require_finite: Whether a request whose layers hold NaN or infinity fails; else they are
            sent as they are.
    """

    source: Text
    name: Annotated[str, Meta(description="a text")] = ""
    weights: Text = "DEFAULT"
    seed: Annotated[int, Meta(ge=0, description="a number from 0")] = 0
    item_shape: Sizes = None
    precision: Annotated[
        Literal["", "float32", "float16", "bfloat16"],
        Meta(description="'float32', 'float16' or 'bfloat16'"),
    ] = ""
    channels_last: Annotated[bool, Meta(description="true or false")] = False
    layers: Layers = ()
    require_finite: Annotated[bool, Meta(description="true or false")] = False

    def spec(self) -> ModelSpec:
        """Return what to load; raise ConfigError for a malformed field."""
        return ModelSpec(
            self.source,
            self.name,
            self.weights,
            self.seed,
            self.item_shape,
            self.precision,
            self.channels_last,
        )

    def selections(self) -> tuple[LayerSelection, ...]:
        """Return the layers to declare; raise InvalidInputError for a malformed one."""
        return tuple(LayerSelection.parse(layer) for layer in self.layers)


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that ``layertap serve`` can be told."""

    server: ServerSection = ServerSection()
    limits: LimitsSection = LimitsSection()
    models: tuple[ModelSection, ...] = ()

    def check_names(self) -> None:
        """Raise ConfigError where two models would answer to one name."""
        seen: set[str] = set()
        for model in self.models:
            name = model.spec().name
            if name in seen:
                raise ConfigError(f"two models are called {name!r}; give one another name")
            seen.add(name)


def with_flags(
    config: ServerConfig,
    models: Sequence[str] = (),
    model_flags: dict[str, Any] | None = None,
    server_flags: dict[str, Any] | None = None,
) -> ServerConfig:
    """Return the configuration with what was said on the command line, which wins.

    Args:
        config: What the file says, or the defaults.
        models: ``[NAME=]SOURCE`` texts; if there are any they take the place of the file's models.
        model_flags: Fields of ModelSection, set for every model; None leaves a field as it is.
        server_flags: Fields of ServerSection likewise.

    Raises:
        ConfigError: For a malformed model.
    """
    chosen = config.models
    if models:
        specs = [ModelSpec.parse(text) for text in models]
        chosen = tuple(ModelSection(source=spec.source, name=spec.name) for spec in specs)
    return ServerConfig(
        server=msgspec.structs.replace(config.server, **_given(server_flags)),
        limits=config.limits,
        models=tuple(msgspec.structs.replace(each, **_given(model_flags)) for each in chosen),
    )


def _user_cache() -> Path:
    """Return the folder of the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "layertap" / "plans"


def _given(flags: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (flags or {}).items() if value is not None}
