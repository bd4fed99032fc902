"""Loads, replaces and unloads the models of the configuration, and reports their health."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from layertap.app.config import ServerConfig
from layertap.app.fingerprint import Fingerprint, fingerprint_of
from layertap.app.health import ModelHealth
from layertap.app.narrator import Narrator
from layertap.engine import Call, Engine, ModelHost, choose_device
from layertap.errors import (
    CancelledError,
    ExtractorUnsupportedError,
    InvalidInputError,
    LayertapError,
    ModelLoadError,
    ModelNotFoundError,
    NotFoundError,
)
from layertap.services.reload_report import ModelReload, ReloadAction
from layertap.settings import ServedModel

__all__ = ["ServedModels"]

_log = logging.getLogger(__name__)


class ServedModels:
    """Keeps an engine's models and their health in step with a configuration.

    Not safe to share between threads: only one thread may load or reload at a time.

    Args:
        engine: The engine; nothing else may change its models.
        health: A warm model is reported here as SERVING, any other as NOT_SERVING.
        narrator: Reports which models were loaded and which were not.
    """

    def __init__(self, engine: Engine, health: ModelHealth, narrator: Narrator) -> None:
        self._engine = engine
        self._health = health
        self._narrator = narrator
        # None if the model is in the configuration but not served.
        self._served: dict[str, Fingerprint | None] = {}

    def load(self, config: ServerConfig, *, strict: bool) -> None:
        """Load all models at the start; one that fails doesn't stop the others.

        Raises:
            LayertapError: If a model fails and ``strict`` is set, or if all models fail.
        """
        self._expect(config)
        failures = []
        for model in config.models:
            try:
                self._load(model, self._engine.load)
            except Exception as error:
                if strict or len(config.models) == 1:
                    raise
                self._fail(model, error)
                failures.append(error)
        if len(failures) == len(config.models):
            raise ModelLoadError("none of the models could be loaded")

    def reload(self, config: ServerConfig, call: Call) -> tuple[ModelReload, ...]:
        """Load new and changed models, then unload removed ones; return a report on each model.

        Raises:
            CancelledError: If the call was cancelled; finished steps are not undone.
        """
        self._expect(config)
        names = [model.name for model in config.models]
        done = [self._update(model, call) for model in config.models]
        done += [self._unload(name) for name in list(self._served) if name not in names]
        self._health.show_server(serving=bool(self._engine.hosts()))
        return tuple(done)

    def load_one(self, config: ServerConfig, name: str, call: Call) -> ModelReload:
        """Load a model of the configuration if it is new or has changed.

        Raises:
            ModelNotFoundError: If the configuration has no such model.
            CancelledError: If the call was cancelled.
        """
        model = next((each for each in config.models if each.name == name), None)
        if model is None:
            raise ModelNotFoundError(f"model: got {name!r}, which the configuration does not name")
        self._served.setdefault(name, None)
        done = self._update(model, call)
        self._health.show_server(serving=bool(self._engine.hosts()))
        return done

    def unload_one(self, config: ServerConfig, name: str) -> None:
        """Unload a model that stays in the configuration.

        Raises:
            ModelNotFoundError: If no such model is served.
        """
        if self._served.get(name) is None:
            raise ModelNotFoundError(f"model: got {name!r}, which is not served")
        self._unload(name)
        # It is still in the configuration; only a reload without it removes this entry.
        self._served[name] = None
        self._engine.expect([model.name for model in config.models])
        self._engine.explain(name, "it was unloaded")
        self._health.show_server(serving=bool(self._engine.hosts()))

    def _expect(self, config: ServerConfig) -> None:
        names = [model.name for model in config.models]
        self._engine.expect(names)
        for name in names:
            if self._served.setdefault(name, None) is None:
                self._health.show(name, serving=False)

    def _update(self, model: ServedModel, call: Call) -> ModelReload:
        name = model.name
        served = self._served[name]
        if served is not None and served == fingerprint_of(model):
            return ModelReload(name, ReloadAction.UNCHANGED)

        def replace(*args: object, **options: object) -> ModelHost:
            return self._engine.replace(*args, **options, call=call)  # type: ignore[arg-type]

        try:
            self._load(model, replace)
        except CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - reported, and logged if it is unexpected
            self._fail(model, error)
            reason = _text(error)
            return ModelReload(name, ReloadAction.FAILED, reason, serving=served is not None)
        return ModelReload(name, ReloadAction.REPLACED if served else ReloadAction.LOADED)

    def _unload(self, name: str) -> ModelReload:
        self._served.pop(name)
        self._health.forget(name)
        self._engine.unload(name, wait=False)
        self._narrator.say(f"unloaded {name}")
        return ModelReload(name, ReloadAction.UNLOADED, serving=False)

    def _load(self, model: ServedModel, load: Callable[..., ModelHost]) -> None:
        name, declared = model.name, model.layers
        state = fingerprint_of(model)
        begun = time.monotonic()
        compiling = f" and compiling {len(declared)} layers" if declared else ""
        with self._narrator.busy(f"loading {name}{compiling}"):
            host = load(
                model.spec,
                declared,
                options=model.options,
                device=choose_device(model.device) if model.device else "",
            )
        former, self._served[name] = self._served[name], state
        self._health.show(name, serving=True)
        loaded = host.model
        self._narrator.say(
            f"{'replaced' if former else 'loaded'} {loaded.name}: {loaded.source}, weights "
            f"{loaded.weights}, on {loaded.device}, in {time.monotonic() - begun:.1f} s"
        )
        if assumed := loaded.assumptions():
            self._narrator.say(assumed, logging.WARNING)

    def _fail(self, model: ServedModel, error: Exception) -> None:
        name = model.name
        self._engine.explain(name, _public(error))
        if not isinstance(error, LayertapError):
            _log.error("loading model %s failed", name, exc_info=error)
        what = (
            "not replaced, still serving the previous version"
            if self._served[name]
            else "not loaded"
        )
        self._narrator.say(f"model {name}: {what}: {_text(error)}", logging.ERROR)


def _text(error: Exception) -> str:
    if isinstance(error, LayertapError):
        return str(error)
    return f"unexpected {type(error).__name__}; the log has the details"


def _public(error: Exception) -> str:
    """Return a text that any caller may read: without paths and without the model's own errors."""
    if isinstance(error, (InvalidInputError, NotFoundError, ExtractorUnsupportedError)):
        return str(error)  # An error about declared layers, the same as for a request for them.
    return "it could not be loaded; the server's log says why"
