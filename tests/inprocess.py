"""``layertap serve`` inside the test's process, so that PyTorch need not be imported again.

Signals, the end of the process and its output need a real one: see processes.py.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from layertap.app.config import ServerConfig
from layertap.app.lifecycle import RunningServer
from layertap.cli.main import main
from layertap.cli.serve import read_config

MARKS = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


def configured(*args: str) -> tuple[ServerConfig, partial[ServerConfig], Path | None]:
    """Return what arguments of ``layertap serve`` configure, how to read it again, and the file."""
    flags = main.commands["serve"].make_context("serve", list(args)).params
    models, file = flags.pop("models"), flags.pop("config_file")
    read = partial(read_config, models, file, flags)
    return read(), read, Path(file) if file else None


class Served:
    """A running server, and the lines that ``layertap serve`` would print."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.running: RunningServer | None = None

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Record a line."""
        with self._news:
            self.lines.append(f"layertap: {MARKS.get(level, '')}{text}")
            self._news.notify_all()

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Show nothing."""
        return nullcontext()

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches, and return the match."""
        with self._news:
            while True:
                found = [match for line in self.lines if (match := re.search(pattern, line))]
                if found:
                    return found[0]
                assert self._news.wait(60), f"never said {pattern!r}: {self.lines}"

    @property
    def address(self) -> str:
        """The address at which it serves."""
        assert self.running is not None
        return self.running.server.address

    def hang_up(self) -> None:
        """Do what SIGHUP does."""
        assert self.running is not None
        self.running.reload()


@contextmanager
def served(*args: str) -> Iterator[Served]:
    """Serve with the arguments of ``layertap serve``: a free port, no metrics.

    Memory is not kept, which would be for the whole process.
    """
    common = ("--port", "0", "--metrics-port", "-1", "--no-keep-memory")
    config, read, file = configured(*common, *args)
    server = Served()
    with ExitStack() as closing:
        server.running = RunningServer(config, server, read, file, closing)
        closing.callback(server.running.reloader.stop)
        yield server
