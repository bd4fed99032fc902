"""Runs a server in this process: start, load, serve, drain, exit."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from layertap.addresses import bare_host, is_unix
from layertap.app.budget import excess
from layertap.app.config import ServerConfig
from layertap.app.fingerprint import files_of
from layertap.app.health import ModelHealth
from layertap.app.http_page import HttpPage
from layertap.app.narrator import Narrator
from layertap.app.notify import notify
from layertap.app.reload import Reloader
from layertap.app.security import open_security
from layertap.app.served_models import ServedModels
from layertap.app.server import FeatureServer
from layertap.app.telemetry import open_telemetry
from layertap.app.watch import Watcher
from layertap.engine import Engine, allow_tf32, choose_device
from layertap.errors import ConfigError, LayertapError
from layertap.extraction.plan_folder import open_plan_cache
from layertap.malloc import begin_loading, keep_memory
from layertap.resources import available_cpus, file_budget, raise_file_limit
from layertap.services.admin_service import AdminService
from layertap.services.reload_report import ReloadReport
from layertap.settings import METRICS_OFF, ServerOptions
from layertap.settings.value_kinds import MIB
from layertap.threads import THREADS_REFUSED, is_thread_refused

__all__ = ["RunningServer", "compute_threads", "keep_freed_memory", "open_engine", "run_server"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_END = b"\0"


class _Signals:
    """SIGTERM and SIGINT: the first asks to stop, the second ends the process. SIGHUP: reload.

    Python runs signal handlers in the main thread, and only while that executes Python code. While
    it waits for a lock, it may miss a signal that arrives just before the wait. So another thread
    reads the pipe into which the interpreter writes the number of each signal as it arrives, and
    the handlers themselves do nothing.
    """

    def __init__(self) -> None:
        self._arrived: SimpleQueue[int] = SimpleQueue()
        self._asked = False
        self._ready = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals; restore the former handlers afterwards. For the main thread."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        listener = threading.Thread(
            target=self._listen, args=(reading,), name="layertap-signals", daemon=True
        )
        former_pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        former = {number: signal.signal(number, _ignore) for number in _SIGNALS}
        listener.start()
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_pipe)
            os.write(writing, _END)
            listener.join()
            os.close(reading)
            os.close(writing)

    def ready(self) -> None:
        """Record that from now on there may be calls to finish before the end."""
        self._ready = True

    def wait(self, reload: Callable[[], None]) -> None:
        """Block until the process is asked to stop; call ``reload`` for each SIGHUP."""
        while self._arrived.get() == signal.SIGHUP:
            reload()

    def _listen(self, pipe: int) -> None:
        while (number := os.read(pipe, 1)) != _END:
            if number[0] in _SIGNALS:
                self._handle(number[0])

    def _handle(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._arrived.put(number)
            return
        if self._asked:
            os._exit(128 + number)
        if not self._ready:
            # No call was admitted yet, and a model that is being downloaded can't be interrupted.
            # This avoids print and the console, because another thread may hold their locks.
            os.write(sys.stderr.fileno(), b"layertap: stopped before it was ready\n")
            os._exit(0)
        self._asked = True
        self._arrived.put(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing, instead of the default action, which ends the process."""


def run_server(
    config: ServerConfig,
    narrator: Narrator,
    read: Callable[[], ServerConfig] | None = None,
    config_file: Path | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT. For the main thread of a process.

    The server answers from the start. Its health is NOT_SERVING until every model that can be
    loaded is loaded and its declared layers are warm. On SIGHUP it reloads (docs/lifecycle.md).
    When asked to stop, it refuses new calls, gives admitted calls their grace period and ends. When
    asked again, it ends at once with code 128 + the signal's number. When asked before it is ready,
    it ends at once with code 0.

    Args:
        config: What to serve, and how.
        narrator: Reports progress and errors.
        read: Reads the configuration again for a reload; if not given, a reload loads changed
            weights only.
        config_file: The configuration file, which is watched if the configuration says so.

    Returns:
        The exit code: 0 after a requested stop, 1 after an error.
    """
    raise_file_limit()
    signals = _Signals()
    with signals.handled():
        try:
            with ExitStack() as closing:
                running = RunningServer(
                    config, narrator, read or (lambda: config), config_file, closing
                )
                signals.ready()
                notify("READY=1")
                narrator.say(
                    f"serving {running.names()} on {' and '.join(running.server.addresses)}"
                )
                signals.wait(running.reload)
                notify("STOPPING=1")
                narrator.say("stopping: waiting for admitted calls")
                running.stop()
        except LayertapError as error:
            narrator.say(str(error), logging.ERROR)
            return 1
        except RuntimeError as error:
            if not is_thread_refused(error):
                raise
            narrator.say(THREADS_REFUSED, logging.ERROR)
            return 1
    narrator.say("stopped serving")
    return 0


class RunningServer:
    """A server with its models, health, reloads, metrics and traces.

    Once it is constructed, its models are loaded and it serves.

    Args:
        config: What to serve, and how.
        narrator: Reports progress and errors.
        read: Reads the configuration again for a reload.
        config_file: The configuration file, which is watched if the configuration says so.
        closing: When it is closed, it stops the server and closes everything of the server.

    Attributes:
        engine: The engine.
        health: The health of the models.
        observer: Is notified how each extraction ended.
        server: The gRPC server.
        reloader: Runs the reloads.

    Raises:
        LayertapError: If the configuration is wrong, no model could be loaded, or an address can't
            be bound.
    """

    def __init__(
        self,
        config: ServerConfig,
        narrator: Narrator,
        read: Callable[[], ServerConfig],
        config_file: Path | None,
        closing: ExitStack,
    ) -> None:
        config.check()
        self._narrator = narrator
        # Done first, because it is quick, and a missing file is a common mistake.
        security = open_security(config.server.secrets, trusted=config.trusts_local_callers)
        self.engine = open_engine(config, narrator)
        closing.callback(self.engine.close)
        self.health = health = ModelHealth()
        models = ServedModels(self.engine, health, narrator)
        self.reloader = Reloader(read, config, models, narrator)
        options = config.server
        admin = AdminService(self._reload_now) if options.admin else None
        telemetry = open_telemetry(self.engine, config, closing)
        self.observer = telemetry.observer
        self.server = FeatureServer(
            self.engine,
            options,
            telemetry.observer,
            interceptors=telemetry.interceptors,
            health=health,
            admin=admin,
            security=security,
            repository=self.reloader if options.admin else None,
        )
        telemetry.metrics.show_waiting(lambda: self.server.waiting)
        if self.server.shared_memory is not None:
            telemetry.metrics.show_shared_memory(self.server.shared_memory)
        closing.callback(self.server.stop, 0.0)
        self.server.start()
        if options.metrics_port != METRICS_OFF:
            page = HttpPage(
                telemetry.metrics.registry,
                "127.0.0.1" if is_unix(options.host) else bare_host(options.host),
                options.metrics_port,
                alive=lambda: self.engine.alive,
                ready=lambda: health.serving(""),
                connections=file_budget().http_connections,
            )
            closing.callback(page.close)
            narrator.say(f"metrics on {page.url}")
        watcher = Watcher(lambda: self._files(config_file), self.reload)
        models.load(config, strict=options.strict)
        keep_freed_memory(options, narrator)
        self.server.ready()
        self.reloader.start()
        if options.watch:
            watcher.start()
            closing.callback(watcher.close)
        metrics_shown = options.metrics_port != METRICS_OFF
        for warning in self.server.security.warnings(options.host, metrics=metrics_shown):
            narrator.say(warning, logging.WARNING)
        if too_much := excess(config.promised_bytes):
            narrator.say(too_much, logging.WARNING)

    def names(self) -> str:
        """Return the names of the served models as text."""
        return ", ".join(host.model.name for host in self.engine.hosts())

    def reload(self) -> None:
        """Read certificates and tokens again, and request a reload of the models."""
        try:
            # At once: revoking a leaked token must not wait for a model that is being loaded.
            self.server.security.reload()
        except LayertapError as error:
            self._narrator.say(str(error), logging.ERROR)
        self.reloader.request()

    def _reload_now(self) -> ReloadReport:
        """Reload for a caller who waits for the report."""
        self.server.security.reload()
        return self.reloader.reload()

    def stop(self) -> None:
        """Refuse new calls, and answer admitted calls within the grace period."""
        self.reloader.stop()
        self.server.stop(self.reloader.config.server.grace_seconds)
        if self.reloader.busy:
            # A model that hangs while loading can't be interrupted, so we don't wait for it.
            self._narrator.say("stopped serving")
            os._exit(0)

    def _files(self, config_file: Path | None) -> Iterator[Path]:
        if config_file is not None:
            yield config_file
        for model in self.reloader.config.models:
            yield from files_of(model)


def compute_threads(options: ServerOptions, device: str) -> tuple[int, int | None]:
    """Return (concurrent forward passes, CPUs per pass); None for all CPUs that may be used.

    Raises:
        ConfigError: If the mode is throughput and the device is CUDA.
    """
    if options.mode == "latency":
        return 1, options.threads
    if device != "cpu":
        raise ConfigError(
            f"mode: got 'throughput' on {device}, where one pass uses the whole device; "
            f"expected 'latency'"
        )
    return options.threads or available_cpus(), 1


def open_engine(config: ServerConfig, narrator: Narrator) -> Engine:
    """Return an engine without models, as a configuration wants it; the caller must close it.

    Call ``keep_freed_memory`` once its first models are loaded.

    Raises:
        LayertapError: If the device can't be used or settings contradict each other.
    """
    options = config.server
    if options.keep_memory:
        begin_loading()
    allow_tf32(options.tf32)
    device = choose_device(options.device)
    instances, threads = compute_threads(options, device)
    cache = open_plan_cache(
        options.plan_cache, options.plan_cache_bytes, catalogues=options.keep_catalogues
    )
    return Engine(config.limits, device, threads, cache, instances)


def keep_freed_memory(options: ServerOptions, narrator: Narrator) -> None:
    """Keep freed memory from now on, if the options say so."""
    if options.keep_memory and not keep_memory(options.keep_memory_bytes // MIB):
        narrator.say(
            "note: with this C library freed memory can't be kept, so large replies take longer"
        )
