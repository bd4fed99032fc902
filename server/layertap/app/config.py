"""What a server can be told: the sections of ``layertap.toml``, and flags that win over them.

``layertap.app.config_file`` reads the file. Each field's type carries the words in which its error
message says what is expected.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from layertap.addresses import is_loopback
from layertap.app.budget import MIB, default_mib
from layertap.app.logs import LogFormat, LogLevel
from layertap.app.security import SecretFiles, open_security
from layertap.app.server import PORT, UNIX_SOCKET_MODE, ServerOptions
from layertap.batching import BatchPolicy
from layertap.engine import DEVICE_PATTERN, HostOptions, Limits
from layertap.errors import ConfigError
from layertap.extraction.plan_cache import PlanCache
from layertap.models import INPUT_DTYPES, ImageSettings, ModelSpec
from layertap.resources import available_cpus
from layertap.selection import LayerSelection
from layertap.shm.client_regions import ClientRegions
from layertap.shm.shared_memory import DEFAULT_LEASE_SECONDS

__all__ = ["LimitsSection", "ModelSection", "ServerConfig", "ServerSection", "with_flags"]

_log = logging.getLogger(__name__)

SECRET_FILES = tuple(field.name for field in fields(SecretFiles))
METRICS_OFF = -1
METRICS_PORT = 8002

Count = Annotated[int, Meta(ge=1, description="a number from 1")]
Mib = Annotated[
    Annotated[int, Meta(ge=1, le=2047)] | None, Meta(description="a number of MiB, 1 to 2047")
]
Budget = Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="a number of MiB from 1")]
Text = Annotated[str, Meta(min_length=1, description="a text")]
Layers = Annotated[
    tuple[str, ...], Meta(description='a list of layers such as ["layer1", "avgpool:input"]')
]
Threads = Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="a number from 1")]
File = Annotated[Annotated[str, Meta(min_length=1)] | None, Meta(description="a file")]
Sizes = Annotated[
    tuple[Annotated[int, Meta(ge=1)], ...] | None,
    Meta(description="sizes of one item without the batch, such as [3, 224, 224]"),
]
Numbers = Annotated[
    tuple[float, ...] | None,
    Meta(description="a list with a number for each channel, such as [0.5, 0.5, 0.5]"),
]
ImageSize = Annotated[
    tuple[Annotated[int, Meta(ge=1)], ...] | None,
    Meta(description="a list of one size or of height and width, or an empty one for none"),
]
Device = Annotated[
    str,
    Meta(pattern=rf"^({DEVICE_PATTERN})$", description="'auto', 'cpu', 'cuda' or 'cuda:1'"),
]


class ServerSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[server]``: where to listen and what to run on.

    Attributes:
        host: The address to bind, for calls and for metrics; ``unix:/path`` or
            ``unix-abstract:name`` answers calls on a Unix socket only.
        unix_socket: The path of a Unix socket on which calls are answered as well.
        unix_socket_mode: The permissions of its file, in octal digits.
        max_connection_age_seconds: How long a connection lasts, give or take a tenth, before its
            client has to make another; 0 for no end.
        max_connection_age_grace_seconds: How long the calls and streams of such a connection may
            take to finish; 0 for no end.
        port: Where calls are answered; 0 for a free port.
        metrics_port: Where the metrics page is; 0 for a free port, -1 for no page.
        device: ``auto``, ``cpu``, ``cuda`` or one of several as ``cuda:1``; ``auto`` is CUDA where
            there is a device, else the CPU.
        mode: ``latency`` gives all CPUs to one forward pass, ``throughput`` one CPU to each of
            as many passes as there are CPUs.
        threads: CPUs to compute with: those of one forward pass in latency mode, the passes that
            run at once in throughput mode. If not given, as many as the process may use: the
            machine's cores, or the whole CPUs of its quota if those are fewer.
        tf32: Whether CUDA devices may compute float32 convolutions and matrix products in TF32,
            which is faster and as exact as float16.
        plan_cache: The folder where compiled plans of declared layers are kept for the next start;
            ``auto`` is the user's cache folder, ``off`` keeps none.
        plan_cache_mib: MiB that the folder may grow to.
        grace_seconds: How long admitted calls may take to finish once the server was asked to stop.
        keep_memory: Whether memory freed by a reply is kept for the next one.
        keep_memory_mib: MiB of free memory that may be kept. If not given, 1024, or an eighth of
            the memory that the process may use if that is less.
        shared_memory_mib: MiB that may be shared with clients of this machine; 0 for none. If not
            given, as for ``keep_memory_mib``.
        shared_memory_lease_seconds: How long such a client may keep what was lent to it.
        tls_cert: PEM file: the server's certificate and those up to its authority; turns TLS on.
        tls_key: PEM file: its private key.
        tls_client_ca: PEM file: authorities, one of which must vouch for each client.
        extract_tokens_file: Bearer tokens that may extract, one a line; anybody may if not given.
        admin_tokens_file: Bearer tokens that may administrate as well; nobody may if not given.
        log_format: ``human``, or ``json`` for a JSON object a line.
        log_level: The least that is logged; ``info`` logs every extraction.
        otel_endpoint: Where OpenTelemetry traces go, as ``http://host:4317``; none if empty, unless
            the ``OTEL_*`` environment variables name one.
        strict: Whether the server ends where one model can't be loaded at the start; else it
            serves the others.
        admin: Whether ``layertap.v1.AdminService`` is served, and models can be loaded and unloaded
            by the Open Inference Protocol.
        watch: Whether changed files are reloaded without being asked to.
        allow_client_shm: Whether clients of this machine may name shared memory for inputs and
            outputs (docs/protocol.md).
        client_shm_uids: Users whose shared memory is taken besides that of the server's own user.
    """

    host: Text = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="0 for a free port, to 65535")] = PORT
    unix_socket: File = None
    unix_socket_mode: Annotated[
        str,
        Meta(pattern="^0?[0-7]{3}$", description="permissions in octal digits, such as '0660'"),
    ] = f"{UNIX_SOCKET_MODE:04o}"
    max_connection_age_seconds: Annotated[
        float, Meta(ge=0, description="seconds from 0, 0 for no end")
    ] = 0.0
    max_connection_age_grace_seconds: Annotated[
        float, Meta(ge=0, description="seconds from 0, 0 for no end")
    ] = 0.0
    metrics_port: Annotated[
        int, Meta(ge=-1, le=65535, description="-1 for no metrics, 0 for a free port, to 65535")
    ] = METRICS_PORT
    device: Device = "auto"
    mode: Annotated[
        Literal["latency", "throughput"], Meta(description="'latency' or 'throughput'")
    ] = "latency"
    threads: Threads = None
    tf32: Annotated[bool, Meta(description="true or false")] = False
    plan_cache: Annotated[str, Meta(min_length=1, description="a folder, 'auto' or 'off'")] = "auto"
    plan_cache_mib: Count = 2048
    grace_seconds: Annotated[float, Meta(ge=0, description="seconds from 0")] = 10.0
    keep_memory: Annotated[bool, Meta(description="true or false")] = True
    keep_memory_mib: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 20)] | None,
        Meta(description="a number of MiB from 1 to 1048576"),
    ] = None
    shared_memory_mib: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="a number of MiB, 0 for none")
    ] = None
    shared_memory_lease_seconds: Annotated[
        float, Meta(gt=0, description="a number of seconds above 0")
    ] = DEFAULT_LEASE_SECONDS
    tls_cert: File = None
    tls_key: File = None
    tls_client_ca: File = None
    extract_tokens_file: File = None
    admin_tokens_file: File = None
    log_format: Annotated[LogFormat, Meta(description="'human' or 'json'")] = "human"
    log_level: Annotated[LogLevel, Meta(description="'debug', 'info', 'warning' or 'error'")] = (
        "warning"
    )
    otel_endpoint: Annotated[str, Meta(description="an address such as http://host:4317")] = ""
    strict: Annotated[bool, Meta(description="true or false")] = False
    admin: Annotated[bool, Meta(description="true or false")] = False
    watch: Annotated[bool, Meta(description="true or false")] = False
    allow_client_shm: Annotated[bool, Meta(description="true or false")] = False
    client_shm_uids: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...],
        Meta(description="a list of numbers of users, such as [1000]"),
    ] = ()

    def options(self) -> ServerOptions:
        """Return how to listen; raise ConfigError for files and settings that won't do."""
        named = {key: getattr(self, key) for key in SECRET_FILES}
        files = SecretFiles(**{k: Path(v).expanduser() for k, v in named.items() if v})
        # Whoever may use this machine may ask it to read again what its owner wrote.
        trusted = self.admin and is_loopback(self.host)
        return ServerOptions(
            self.host,
            self.port,
            security=open_security(files, trusted=trusted),
            shared_memory_bytes=self.shared_mib() * MIB,
            shared_memory_lease_seconds=self.shared_memory_lease_seconds,
            client_regions=self.client_regions(),
            unix_socket=Path(self.unix_socket).expanduser() if self.unix_socket else None,
            unix_socket_mode=int(self.unix_socket_mode, 8),
            connection_age_seconds=self.max_connection_age_seconds,
            connection_age_grace_seconds=self.max_connection_age_grace_seconds,
        )

    def kept_mib(self) -> int:
        """Return the MiB of free memory that may be kept."""
        given = self.keep_memory_mib
        return default_mib("keep_memory_mib") if given is None else given

    def shared_mib(self) -> int:
        """Return the MiB that may be shared with clients of this machine."""
        given = self.shared_memory_mib
        return default_mib("shared_memory_mib") if given is None else given

    def client_regions(self) -> ClientRegions | None:
        """Return the shared memory that clients name; None where they may not.

        Raises:
            ConfigError: For users whose memory would be taken if any were.
        """
        if self.allow_client_shm:
            return ClientRegions(frozenset(self.client_shm_uids))
        if self.client_shm_uids:
            raise ConfigError("client_shm_uids: of no use without allow_client_shm")
        return None

    def compute(self, device: str) -> tuple[int, int | None]:
        """Return (forward passes at once, CPUs of one; None for all that the process may use).

        Raises:
            ConfigError: For throughput mode on CUDA.
        """
        if self.mode == "latency":
            return 1, self.threads
        if device != "cpu":
            raise ConfigError(
                f"mode: got 'throughput' on {device}, where one pass fills the device; "
                f"expected 'latency'"
            )
        return self.threads or available_cpus(), 1

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

    Limits in MiB that are not given are those of ``layertap.engine.Limits``, or less where the
    memory that the process may use is small (``layertap.app.budget``).

    Attributes:
        request_mib: MiB of one request message.
        reply_mib: MiB of one reply message; protobuf itself ends below 2048.
        batch: Items of one request.
        pixels: Pixels of one encoded image; four times as many of all that a request has, in the
            sizes in which the model takes them.
        layers: Selections of one request, and layers that they match.
        pending: Requests that wait for a compute thread or run on one.
        pending_mib: MiB of the requests and replies in memory: received, decoded, being made or
            being sent.
        plans: Plans of one model that are kept besides the declared ones.
        plan_mib: MiB that the weights of one model's compiled plans may take besides.
        streams: Streams that may be open at once.
        stream_in_flight: Items of one stream that are read and whose replies are not yet sent.
    """

    request_mib: Mib = None
    reply_mib: Mib = None
    batch: Count = Limits().batch
    pixels: Count = Limits().pixels
    layers: Count = Limits().layers
    pending: Count = Limits().pending
    pending_mib: Budget = None
    plans: Count = Limits().plans
    plan_mib: Budget = None
    streams: Count = Limits().streams
    stream_in_flight: Count = Limits().stream_in_flight

    def limits(self) -> Limits:
        """Return the engine's own form, in bytes, with what was not given filled in."""
        given = msgspec.structs.asdict(self)
        sizes = {
            name.replace("_mib", "_bytes"): (given.pop(name) or default_mib(name)) * MIB
            for name in tuple(given)
            if name.endswith("_mib")
        }
        return Limits(**sizes, **given)


class ModelSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[models]]``: one model; the fields of ``layertap.models.ModelSpec`` and its layers.

    Attributes:
        source: A torchvision model, a TorchScript file or a factory ``package.module:function``.
        name: What requests call it; derived from the source if empty.
        weights: ``DEFAULT``, a torchvision weights name, a file, or ``random``.
        weights_key: Which state dict of the file is meant, as in ``teacher.backbone``; chosen by
            the model's names if empty.
        seed: Seeds random weights.
        item_shape: Sizes of one item without the batch.
        input_dtype: The element type of the input, such as ``int64``; found by trying if empty.
        free_dims: The dimensions of the input that may have another size, as indices into
            item_shape: [0] for token ids of any length; found by trying if not given.
        precision: ``float32``, ``float16`` or ``bfloat16``; the weights' own if empty.
        channels_last: Whether convolutions' weights are laid out with channels last.
        layers: Layers to compile and warm before the server reports itself as ready.
        require_finite: Whether a request whose layers hold NaN or infinity fails; else they are
            sent as they are.
        device: Where it runs, as in ``[server]``; the server's if empty.
        max_batch_size: Items of requests that may share a forward pass; 1 runs each alone.
        max_queue_delay_us: Microseconds that a request may be held back for others to join it,
            where the last pass had several callers; 0 joins only those that wait already.
        cuda_graphs: Batch sizes at which the layers are served by a CUDA graph; of no effect on a
            CPU.
        image_mean: Subtracted from pixels in [0, 1], one number for each channel or one for all;
            ``[]`` for no normalisation. This and the following keys replace steps of the image
            preprocessing that the model's own configuration describes.
        image_std: The pixels are divided by it after that.
        image_resize: One size for the short side, or height and width; ``[]`` for no resizing.
        image_crop: One size or height and width, cut out of the centre; ``[]`` for no cropping.
        image_interpolation: How resizing interpolates, such as ``bicubic``.
        image_color: ``rgb`` or ``gray``, the channels that image files are decoded to.
        exif_orientation: Whether a picture is turned as its EXIF orientation says; true if not
            given.
    """

    source: Text
    name: Annotated[str, Meta(description="a text")] = ""
    weights: Text = "DEFAULT"
    weights_key: Annotated[str, Meta(description="a text")] = ""
    seed: Annotated[int, Meta(ge=0, description="a number from 0")] = 0
    item_shape: Sizes = None
    input_dtype: Annotated[
        str, Meta(pattern=f"^({'|'.join(INPUT_DTYPES)})?$", description=" or ".join(INPUT_DTYPES))
    ] = ""
    free_dims: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...] | None,
        Meta(description="a list of indices into item_shape, such as [1, 2]"),
    ] = None
    precision: Annotated[
        Literal["", "float32", "float16", "bfloat16"],
        Meta(description="'float32', 'float16' or 'bfloat16'"),
    ] = ""
    channels_last: Annotated[bool, Meta(description="true or false")] = False
    layers: Layers = ()
    require_finite: Annotated[bool, Meta(description="true or false")] = False
    device: Annotated[
        str,
        Meta(pattern=rf"^({DEVICE_PATTERN})?$", description="'auto', 'cpu', 'cuda' or 'cuda:1'"),
    ] = ""
    max_batch_size: Count = 1
    max_queue_delay_us: Annotated[int, Meta(ge=0, description="microseconds from 0")] = 0
    cuda_graphs: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...],
        Meta(description="a list of batch sizes, such as [1, 8]"),
    ] = ()
    image_mean: Numbers = None
    image_std: Numbers = None
    image_resize: ImageSize = None
    image_crop: ImageSize = None
    image_interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None,
        Meta(description="'nearest', 'bilinear', 'bicubic', 'box', 'hamming' or 'lanczos'"),
    ] = None
    image_color: Annotated[Literal["rgb", "gray"] | None, Meta(description="'rgb' or 'gray'")] = (
        None
    )
    exif_orientation: Annotated[bool | None, Meta(description="true or false")] = None

    def options(self) -> HostOptions:
        """Return how the model is served; raise ConfigError for graphs of no layers."""
        if self.cuda_graphs and not self.layers:
            raise ConfigError(
                f"cuda_graphs of {self.spec().name}: got {list(self.cuda_graphs)} without layers; "
                f"expected the layers whose passes are to be recorded"
            )
        return HostOptions(
            self.require_finite,
            BatchPolicy(self.max_batch_size, self.max_queue_delay_us * 1e-6),
            self.cuda_graphs,
        )

    def spec(self) -> ModelSpec:
        """Return what to load; raise ConfigError for a malformed field."""
        return ModelSpec(
            source=self.source,
            name=self.name,
            weights=self.weights,
            weights_key=self.weights_key,
            seed=self.seed,
            item_shape=self.item_shape,
            precision=self.precision,
            channels_last=self.channels_last,
            input_dtype=self.input_dtype,
            free_dims=self.free_dims,
            images=ImageSettings(
                mean=self.image_mean,
                std=self.image_std,
                resize=self.image_resize,
                crop=self.image_crop,
                interpolation=self.image_interpolation,
                color=self.image_color,
                exif_orientation=self.exif_orientation,
            ),
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
