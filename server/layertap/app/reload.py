"""Reloads configuration and weights when a signal, a call or a changed file requests it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from layertap.app.config import ServerConfig
from layertap.app.narrator import Narrator
from layertap.app.served_models import ServedModels
from layertap.call import Call
from layertap.errors import CancelledError, LayertapError, ModelLoadError, UnavailableError
from layertap.services.reload_report import ReloadAction, ReloadReport
from layertap.settings import Definition, Limits, ServerOptions, definitions

__all__ = ["Reloader", "waiting_for_restart"]

_log = logging.getLogger(__name__)


class Reloader:
    """Runs one reload at a time.

    Args:
        read: Reads the configuration, with flags.
        config: The configuration at the start.
        models: The models, which are kept in step with the configuration.
        narrator: Reports the outcome of reloads that no caller waits for.
    """

    def __init__(
        self,
        read: Callable[[], ServerConfig],
        config: ServerConfig,
        models: ServedModels,
        narrator: Narrator,
    ) -> None:
        self._read = read
        self._started_with = config
        self._config = config
        self._models = models
        self._narrator = narrator
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._turn = threading.Lock()
        self._call = Call()
        self._ready = False
        # A daemon thread, because a model that hangs while loading must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="layertap-reload", daemon=True)

    @property
    def config(self) -> ServerConfig:
        """The configuration that was last read and valid."""
        return self._config

    @property
    def busy(self) -> bool:
        """Whether a reload is in progress."""
        return self._turn.locked()

    def start(self) -> None:
        """Accept requests for reloads; call this once the server is ready."""
        self._ready = True
        self._thread.start()

    def reload(self) -> ReloadReport:
        """Reload now, in the caller's thread.

        Raises:
            UnavailableError: If another reload is in progress, before ``start``, and after
                ``stop``.
            LayertapError: If the configuration is wrong; then nothing has changed.
        """
        with self._in_turn():
            return self._reload()

    def load_model(self, name: str) -> None:
        """Load one model of the current configuration, in the caller's thread.

        Raises:
            ModelNotFoundError: If the configuration has no such model.
            ModelLoadError: If it can't be loaded.
            UnavailableError, LayertapError: See ``reload``.
        """
        with self._in_turn():
            config = self._read_checked()
            with self._cancellable() as call:
                done = self._models.load_one(config, name, call)
            if done.action is ReloadAction.FAILED:
                raise ModelLoadError(f"failed to load {name!r}: {done.reason}")

    def unload_model(self, name: str) -> None:
        """Unload one model, until it or all models are loaded again.

        Raises:
            ModelNotFoundError: If no such model is served.
            UnavailableError: See ``reload``.
        """
        with self._in_turn():
            self._models.unload_one(self._config, name)

    def request(self) -> None:
        """Request a reload soon, on the reloader's thread, after any reload that is in progress."""
        self._asked.put(True)

    def stop(self) -> None:
        """Refuse reloads, and cancel the one in progress at its next step."""
        self._ready = False
        self._call.cancel()
        self._asked.put(False)

    def _work(self) -> None:
        while self._asked.get():
            # The reload that begins now serves all requests made so far.
            if not self._drain():
                return
            with self._turn:
                try:
                    self._tell(self._reload())
                except LayertapError as error:
                    if self._ready:
                        self._narrator.say(f"not reloaded: {error}", logging.ERROR)
                except Exception:  # noqa: BLE001 - the next reload may work; it is logged in full
                    _log.exception("reload failed")

    def _drain(self) -> bool:
        """Drop waiting requests; return False if the last one was to stop."""
        go_on = True
        while go_on:
            try:
                go_on = self._asked.get_nowait()
            except Empty:
                return True
        return False

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Exclude other reloads; raise UnavailableError if one is in progress."""
        if not self._ready:
            raise UnavailableError("the server is starting or stopping, so it can't reload now")
        if not self._turn.acquire(blocking=False):
            raise UnavailableError("another reload is in progress; try again when it has finished")
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def _cancellable(self) -> Iterator[Call]:
        """Yield a call that ``stop`` cancels; raise UnavailableError if it was cancelled."""
        # A new call for each reload, because a call keeps what was computed for it.
        call = self._call = Call()
        try:
            if not self._ready:  # Stopped just now, before there was a call to cancel.
                call.cancel()
            yield call
        except CancelledError:
            raise UnavailableError("the server is stopping; the reload was abandoned") from None
        finally:
            self._call = Call()

    def _read_checked(self) -> ServerConfig:
        config = self._read()
        config.check()
        return config

    def _reload(self) -> ReloadReport:
        config = self._read_checked()
        with self._cancellable() as call:
            models = self._models.reload(config, call)
        self._config = config
        waiting = waiting_for_restart(self._started_with, config)
        for text in waiting:
            self._narrator.say(f"note: {text}, until the server is restarted")
        return ReloadReport(models, waiting)

    def _tell(self, report: ReloadReport) -> None:
        of = {
            action: [m.name for m in report.models if m.action is action] for action in ReloadAction
        }
        told = [f"{len(names)} {action}" for action, names in of.items() if names]
        self._narrator.say(f"reloaded: {', '.join(told)}")


def waiting_for_restart(started_with: ServerConfig, config: ServerConfig) -> tuple[str, ...]:
    """Return the settings that have changed but can't change while the server runs."""
    return (
        *_changed("server", definitions(ServerOptions), started_with.server, config.server),
        *_changed("limits", definitions(Limits), started_with.limits, config.limits),
    )


def _changed(
    section: str, settings: Iterable[Definition], before: object, now: object
) -> Iterator[str]:
    for each in settings:
        old, new = each.value_in(before), each.value_in(now)
        if new != old and not each.setting.live:
            yield f"{section}.{each.key}: {new!r}, still {old!r}"
