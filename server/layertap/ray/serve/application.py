"""The application that ``serve run layertap.ray.serve:app`` runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from layertap.app.config import ServerConfig, with_flags
from layertap.app.config_file import config_of, load_config
from layertap.errors import ConfigError
from layertap.ray.serve.replica import Replica

__all__ = ["application"]

_INLINE = ("models", "server", "limits")
_KEYS = ("config", *_INLINE, "direct", "deployment")
_BOOLEANS = {True: True, False: False, "true": True, "false": False}


def application(args: Mapping[str, Any]) -> serve.Application:
    """Return the application; see ``layertap.ray.serve.app``."""
    if unknown := sorted(set(args) - set(_KEYS)):
        raise ConfigError(f"{unknown[0]}: unknown argument; arguments are {', '.join(_KEYS)}")
    direct = args.get("direct", False)
    if direct not in _BOOLEANS:
        raise ConfigError(f"direct: got {direct!r}, expected true or false")
    config = _config(args)
    config.check()
    options = args.get("deployment", {})
    if not isinstance(options, Mapping):
        raise ConfigError(f"deployment: got {options!r}, expected options of a Ray deployment")
    deployment = serve.deployment(name="FeatureService", **_options(config, options))(Replica)
    bound: serve.Application = deployment.bind(config, direct=_BOOLEANS[direct])
    return bound


def _options(config: ServerConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the deployment; ``given`` ones have priority."""
    pending = config.limits.pending
    options: dict[str, Any] = {
        # As many as a replica accepts; Ray keeps the others for another replica, or for later.
        "max_ongoing_requests": pending,
        "max_queued_requests": 4 * pending,
        "graceful_shutdown_timeout_s": config.server.grace_seconds,
    }
    if "num_replicas" not in given:
        options["autoscaling_config"] = {
            "min_replicas": 1,
            "max_replicas": 8,
            "target_ongoing_requests": max(1, pending // 4),
        }
    return {**options, **given}


def _config(args: Mapping[str, Any]) -> ServerConfig:
    """Return what the arguments configure."""
    if "config" in args:
        if inline := [key for key in _INLINE if key in args]:
            raise ConfigError(f"{inline[0]}: got it together with config, expected one of the two")
        return load_config(args["config"])
    given = {key: args[key] for key in _INLINE if key in args}
    models = given.get("models")
    if not isinstance(models, str):
        return config_of(given, "arguments")
    return with_flags(config_of({**given, "models": []}, "arguments"), [models])
