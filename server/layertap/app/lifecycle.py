"""A server's life in one process: start, load, serve, drain, end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import Protocol

from layertap.addresses import bare_host
from layertap.app.config import METRICS_OFF, ModelSection, ServerConfig
from layertap.app.metrics import MetricsPage
from layertap.app.notify import notify
from layertap.app.server import FeatureServer
from layertap.app.telemetry import open_telemetry
from layertap.engine import Engine, choose_device
from layertap.errors import ConfigError, LayertapError
from layertap.wire.memory import keep_memory

__all__ = ["Narrator", "serve"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Narrator(Protocol):
    """Tells the person at the terminal how it goes."""

    def say(self, text: str) -> None:
        """Tell something that happened."""

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Show that something is going on that may take long."""


class _Signals:
    """SIGTERM and SIGINT. The first asks to stop, the second ends the process at once."""

    def __init__(self) -> None:
        # Not an Event, whose lock the handler may find held by the very thread that it interrupts.
        self._arrived: SimpleQueue[int] = SimpleQueue()
        self._asked = False
        self._ready = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals; put the former handlers back afterwards."""
        former = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def ready(self) -> None:
        """From now on there are calls to finish before the end."""
        self._ready = True

    def wait(self) -> None:
        """Block until the process is asked to stop."""
        self._arrived.get()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        if not self._ready:
            # Nothing was admitted, and a model that is being fetched can't be interrupted. Neither
            # print nor the console: the interrupted code may hold their locks.
            os.write(sys.stderr.fileno(), b"layertap: stopped before it was ready\n")
            os._exit(0)
        self._asked = True
        self._arrived.put(number)


def serve(config: ServerConfig, narrator: Narrator) -> int:
    """Serve until SIGTERM or SIGINT. For the main thread of a process.

    The server answers from the start, its health NOT_SERVING until every model is loaded and its
    declared layers are warm. When asked to stop it refuses new calls, gives admitted ones their
    grace and ends; asked again it ends at once, with code 128 + the signal's number. Asked before
    it is ready it ends at once, with code 0.

    Args:
        config: What to serve, and how.
        narrator: Is told how it goes, and what went wrong.

    Returns:
        The exit code: 0 after a stop that was asked for, 1 for anything that made serving
        impossible.
    """
    signals = _Signals()
    with signals.handled():
        try:
            with ExitStack() as closing:
                server = _start(config, narrator, closing)
                signals.ready()
                notify("READY=1")
                narrator.say(f"serving {_names(config)} on {server.address}")
                signals.wait()
                notify("STOPPING=1")
                narrator.say("stopping: waiting for the calls that were admitted")
                server.stop(config.server.grace_seconds)
        except LayertapError as error:
            narrator.say(f"error: {error}")
            return 1
    narrator.say("stopped")
    return 0


def _start(config: ServerConfig, narrator: Narrator, closing: ExitStack) -> FeatureServer:
    config.check_names()
    if not config.models:
        raise ConfigError("models: got none, expected at least one to serve")
    for model in config.models:
        model.selections()  # A misspelt one is told before any model is loaded.
    options = config.server
    if options.keep_memory and not keep_memory(options.keep_memory_mib):
        narrator.say("note: this C library can't keep freed memory, so large replies take longer")
    device = choose_device(options.device)
    instances, threads = options.compute(device)
    engine = Engine(config.limits.limits(), device, threads, options.plans(), instances)
    closing.callback(engine.close)
    telemetry = open_telemetry(engine, config, closing)
    server = FeatureServer(
        engine, options.options(), telemetry.observer, interceptors=telemetry.interceptors
    )
    telemetry.metrics.show_waiting(lambda: server.waiting)
    server.start()
    closing.callback(server.stop, 0.0)
    if options.metrics_port != METRICS_OFF:
        page = MetricsPage(telemetry.metrics, bare_host(options.host), options.metrics_port)
        closing.callback(page.close)
        narrator.say(f"metrics on {page.url}")
    for model in config.models:
        _load(engine, model, narrator)
    server.ready()
    for warning in server.security.warnings(
        options.host, metrics=options.metrics_port != METRICS_OFF
    ):
        narrator.say(f"warning: {warning}")
    return server


def _names(config: ServerConfig) -> str:
    return ", ".join(model.spec().name for model in config.models)


def _load(engine: Engine, model: ModelSection, narrator: Narrator) -> None:
    spec, declared = model.spec(), model.selections()
    begun = time.monotonic()
    compiling = f" and compiling {len(declared)} layers" if declared else ""
    with narrator.busy(f"loading {spec.name}{compiling}"):
        host = engine.load(
            spec, declared, require_finite=model.require_finite, batching=model.batching()
        )
    loaded = host.model
    narrator.say(
        f"loaded {loaded.name}: {loaded.source}, weights {loaded.weights}, on {loaded.device}, "
        f"in {time.monotonic() - begun:.1f} s"
    )
