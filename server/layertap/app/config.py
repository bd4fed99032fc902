"""The whole configuration of a server: ``layertap.toml``, and flags, which have priority.

``layertap.settings`` declares the settings, and ``layertap.app.config_file`` reads the file. Code
here opens no files that settings name, and doesn't import PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layertap.addresses import is_loopback
from layertap.app.budget import defaults_here
from layertap.errors import ConfigError
from layertap.settings import Limits, ModelSpec, ServedModel, ServerOptions, build, replaced

__all__ = ["ServerConfig", "default_config", "with_flags"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The whole configuration of ``layertap serve``.

    Attributes:
        server: ``[server]``.
        limits: ``[limits]``.
        models: ``[[models]]``, in the order of the file.
    """

    server: ServerOptions = field(default_factory=ServerOptions)
    limits: Limits = field(default_factory=Limits)
    models: tuple[ServedModel, ...] = ()

    @property
    def trusts_local_callers(self) -> bool:
        """Whether callers without a token may administrate, if no tokens are configured.

        A caller who can reach a server on the loopback address is on this machine. Such a caller
        may make the server read the operator's files again.
        """
        return self.server.admin and is_loopback(self.server.host)

    @property
    def promised_bytes(self) -> int:
        """Bytes that replies, kept memory and shared memory may take together."""
        kept = self.server.keep_memory_bytes if self.server.keep_memory else 0
        return self.limits.pending_bytes + kept + self.server.shared_memory_bytes

    def check(self) -> None:
        """Find errors that can be found before any model is loaded.

        Raises:
            ConfigError: If there is no model, two models have one name, or settings contradict
                each other.
        """
        if self.server.client_shm_uids and not self.server.allow_client_shm:
            raise ConfigError("client_shm_uids: has no effect without allow_client_shm")
        if not self.models:
            raise ConfigError("models: got none, expected at least one to serve")
        seen: set[str] = set()
        for model in self.models:
            if model.name in seen:
                raise ConfigError(f"two models are called {model.name!r}; give one another name")
            seen.add(model.name)
            model.check()


def default_config() -> ServerConfig:
    """Return the configuration without a file; its limits suit the memory of this machine."""
    return ServerConfig(
        build(ServerOptions, defaults_here(ServerOptions)), build(Limits, defaults_here(Limits))
    )


def with_flags(
    config: ServerConfig,
    models: Sequence[str] = (),
    model_flags: Mapping[str, Any] | None = None,
    server_flags: Mapping[str, Any] | None = None,
) -> ServerConfig:
    """Return the configuration with the flags of a command line, which have priority.

    Args:
        config: The configuration from the file, or the default one.
        models: ``[NAME=]SOURCE`` texts; if there are any, they replace the file's models.
        model_flags: Raw values of settings by key, for every model; None leaves a setting as it is.
        server_flags: Raw values of the server's settings, in the same form.

    Raises:
        LayertapError: If a model or layer is malformed.
    """
    chosen = config.models
    if models:
        chosen = tuple(ServedModel(ModelSpec.parse(text)) for text in models)
    return ServerConfig(
        server=replaced(config.server, _given(server_flags)),
        limits=config.limits,
        models=tuple(replaced(model, _given(model_flags)) for model in chosen),
    )


def _given(flags: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (flags or {}).items() if value is not None}
