"""The settings of a server: its addresses, device, security and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from layertap.malloc import DEFAULT_KEPT_MIB
from layertap.settings import value_kinds as kinds
from layertap.settings.definition import Setting
from layertap.settings.value_kinds import MIB
from layertap.shm.shared_memory import DEFAULT_LEASE_SECONDS, DEFAULT_SHARED_MIB

__all__ = ["METRICS_OFF", "LogFormat", "LogLevel", "SecretFiles", "ServerOptions"]

LogFormat = Literal["human", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

METRICS_OFF = -1
"""The ``metrics_port`` of a server without a metrics page."""


@dataclass(frozen=True, slots=True)
class SecretFiles:
    """The files of certificates and tokens; None for files that are not used.

    Secrets are given only as files, because every user of a machine can read the command lines of
    its processes.
    """

    tls_cert: Annotated[
        Path | None,
        Setting(
            "The server's certificate, then any intermediate certificates; enables TLS.", kinds.PEM
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        Setting("The private key of that certificate, without a passphrase.", kinds.PEM),
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        Setting(
            "CA certificates; clients must present a certificate that one of them signed.",
            kinds.PEM,
        ),
    ] = None
    extract_tokens_file: Annotated[
        Path | None,
        Setting(
            "Bearer tokens that may extract and describe, one per line.",
            kinds.FILE,
            default="no token is needed",
        ),
    ] = None
    admin_tokens_file: Annotated[
        Path | None,
        Setting(
            "Bearer tokens that may also administrate, one per line.",
            kinds.FILE,
            default="only local callers may administrate, and only if there are no tokens at all",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """``[server]``: the settings of one server process. Sizes are in bytes.

    These are only values: the server opens the files and addresses that they name.
    """

    host: Annotated[
        str,
        Setting(
            "The address to listen on, for calls and for metrics; unix:/path and "
            "unix-abstract:name mean a Unix socket instead of a port.",
            kinds.some_text("an address", "ADDRESS"),
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Setting("The port for calls; 0 takes a free one.", kinds.PORT)] = 8001
    unix_socket: Annotated[
        Path | None, Setting("A Unix socket to listen on as well.", kinds.path("a file", "PATH"))
    ] = None
    unix_socket_mode: Annotated[
        int,
        Setting(
            "The permissions of the socket's file: 0600 allows only this user.", kinds.PERMISSIONS
        ),
    ] = 0o600
    max_connection_age_seconds: Annotated[
        float,
        Setting(
            "Seconds, give or take a tenth, after which a client has to connect again, so that a "
            "load balancer can spread connections; 0 means never.",
            kinds.DURATION,
            flag="--max-connection-age",
        ),
    ] = 0.0
    max_connection_age_grace_seconds: Annotated[
        float,
        Setting(
            "Seconds that the calls and streams of such a connection have to finish; 0 means no "
            "limit.",
            kinds.DURATION,
            flag="--max-connection-age-grace",
        ),
    ] = 0.0
    metrics_port: Annotated[
        int,
        Setting(
            "The HTTP port of the Prometheus page and the probes; 0 takes a free one, -1 opens "
            "none.",
            kinds.whole(-1, 65535, "-1 for no metrics, 0 for a free port, or a port to 65535"),
        ),
    ] = 8002
    device: Annotated[
        str,
        Setting(
            "What models run on: cpu, cuda, or one of several GPUs as cuda:1; auto is CUDA if "
            "there is a device, else the CPU.",
            kinds.DEVICE,
        ),
    ] = "auto"
    mode: Annotated[
        Literal["latency", "throughput"],
        Setting(
            "latency gives all CPUs to one forward pass; throughput runs one pass per CPU.",
            kinds.choice("latency", "throughput"),
        ),
    ] = "latency"
    threads: Annotated[
        int | None,
        Setting(
            "CPUs to compute with: those of one pass in latency mode, the passes that run at once "
            "in throughput mode.",
            kinds.COUNT,
            default="as many as the process may use",
        ),
    ] = None
    tf32: Annotated[
        bool,
        Setting(
            "Let CUDA devices compute float32 convolutions and matrix products in TF32, which is "
            "faster and as exact as float16.",
            kinds.TRUTH,
        ),
    ] = False
    plan_cache: Annotated[
        str,
        Setting(
            "The folder that keeps catalogues and the compiled plans of declared layers for the "
            "next start; auto is the user's cache folder, off keeps nothing.",
            kinds.PLAN_CACHE,
        ),
    ] = "auto"
    keep_catalogues: Annotated[
        bool,
        Setting(
            "Keep the catalogues of models in that folder, and use one again if the model, its "
            "code, the versions and the machine are the same; a pass verifies it first.",
            kinds.TRUTH,
        ),
    ] = True
    plan_cache_bytes: Annotated[
        int,
        Setting("MiB that the plan cache may grow to.", kinds.mib(1), key="plan_cache_mib"),
    ] = 2048 * MIB
    grace_seconds: Annotated[
        float,
        Setting(
            "Seconds that admitted calls have to finish after SIGTERM.",
            kinds.DURATION,
            flag="--grace",
            live=True,
        ),
    ] = 10.0
    keep_memory: Annotated[
        bool,
        Setting(
            "Keep freed memory for the next reply; this speeds up large replies most.",
            kinds.TRUTH,
        ),
    ] = True
    keep_memory_bytes: Annotated[
        int,
        Setting(
            "MiB of free memory that may be kept.",
            kinds.mib(1, 1 << 20),
            key="keep_memory_mib",
            memory_share=8,
        ),
    ] = DEFAULT_KEPT_MIB * MIB
    shared_memory_bytes: Annotated[
        int,
        Setting(
            "MiB of memory that may be shared with clients on this machine; 0 disables it.",
            kinds.mib(0, expected="a number of MiB, 0 for none"),
            key="shared_memory_mib",
            memory_share=8,
        ),
    ] = DEFAULT_SHARED_MIB * MIB
    shared_memory_lease_seconds: Annotated[
        float,
        Setting(
            "Seconds that a client may keep shared memory that was lent to it.",
            kinds.DURATION_ABOVE_0,
            flag="--shared-memory-lease",
        ),
    ] = DEFAULT_LEASE_SECONDS
    secrets: SecretFiles = field(default_factory=SecretFiles)
    log_format: Annotated[
        LogFormat,
        Setting("human, or json for one JSON object per line.", kinds.choice("human", "json")),
    ] = "human"
    log_level: Annotated[
        LogLevel,
        Setting(
            "The lowest level that is logged; info logs every extraction.",
            kinds.choice("debug", "info", "warning", "error"),
        ),
    ] = "warning"
    otel_endpoint: Annotated[
        str,
        Setting(
            "Where to send OpenTelemetry traces (OTLP over gRPC), such as http://127.0.0.1:4317; "
            "needs layertap[otel].",
            kinds.ValueKind(str, "an address such as http://host:4317", "URL"),
            default="as the OTEL_* environment variables say, else none",
        ),
    ] = ""
    strict: Annotated[
        bool,
        Setting(
            "Stop if a model can't be loaded at the start, instead of serving the others.",
            kinds.TRUTH,
        ),
    ] = False
    admin: Annotated[
        bool,
        Setting(
            "Serve AdminService, which `layertap reload` calls, and let the Open Inference "
            "Protocol load and unload models.",
            kinds.TRUTH,
        ),
    ] = False
    watch: Annotated[
        bool,
        Setting(
            "Reload when the configuration file or a model's file changes, as SIGHUP does.",
            kinds.TRUTH,
        ),
    ] = False
    allow_client_shm: Annotated[
        bool,
        Setting(
            "Let clients on this machine name shared memory for inputs and outputs (Triton's "
            "system shared memory).",
            kinds.TRUTH,
        ),
    ] = False
    client_shm_uids: Annotated[
        tuple[int, ...],
        Setting(
            "Users whose shared memory is accepted, besides the server's own user.", kinds.USERS
        ),
    ] = ()
