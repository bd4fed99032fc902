"""``layertap`` as a user runs it: in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from warm import Forked

TESTS = Path(__file__).resolve().parent
COMMAND = (sys.executable, "-m", "layertap")
# Without the terminal's own wishes, and with the tests' factories.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")},
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")])),
}

UNCHANGED = dict(ENVIRONMENT)


def layertap(*args: str, fresh: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end.

    Args:
        args: Its arguments.
        fresh: Whether it starts from nothing; else it is forked where PyTorch is imported already,
            which is faster for a verb that imports it.
    """
    if not fresh and ENVIRONMENT == UNCHANGED:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
            files = {"output": output.fileno(), "error": error.fileno()}
            code = Forked(args, ENVIRONMENT, Path.cwd(), **files).wait(60)
            output.seek(0)
            error.seek(0)
            return subprocess.CompletedProcess(args, code, output.read(), error.read())
    return subprocess.run(
        [*COMMAND, *args],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


class Serving:
    """A ``layertap serve`` that runs, and the lines that it wrote to stderr.

    Args:
        args: Its flags.
        prefix: A command that runs the one that follows it, such as one that sets limits first;
            only if it is fresh.
        environment: Variables besides those of ENVIRONMENT. A server that is not fresh has imported
            its libraries without them.
        cwd: The folder to run in; this process's if not given.
        fresh: Whether it starts from nothing; else it is forked where PyTorch is imported already,
            see ``warm``.
    """

    def __init__(
        self,
        args: Sequence[str],
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        *,
        fresh: bool = True,
    ) -> None:
        self.process: subprocess.Popen[str] | Forked
        if fresh:
            self.process = subprocess.Popen(
                [*prefix, *COMMAND, "serve", *args],
                env={**ENVIRONMENT, **(environment or {})},
                stderr=subprocess.PIPE,
                text=True,
                cwd=cwd,
            )
        else:
            assert not prefix
            self.process = Forked(
                ["serve", *args], ENVIRONMENT, cwd or Path.cwd(), more=environment
            )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def line(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait for that many lines that match, and return the match of the last."""
        with self._news:
            while True:
                found = [match for line in self.lines if (match := re.search(pattern, line))]
                if len(found) >= count:
                    return found[count - 1]
                assert not self._ended, f"ended without {pattern!r}: {self.lines}"
                assert self._news.wait(100), f"never said {pattern!r}: {self.lines}"

    @property
    def address(self) -> str:
        """Where it serves, once it does."""
        return self.line(r"^layertap: serving .+ on (\S+)$")[1]

    def ended(self, timeout: float = 30) -> int:
        """Wait until it has ended and return its exit code."""
        code = self.process.wait(timeout)
        self._reader.join()
        return code

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


@contextmanager
def serving(
    *args: str, fresh: bool = False, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """Run ``layertap serve``: a free port and no metrics unless told otherwise.

    It is forked where PyTorch is imported already, unless it is to be fresh; see ``Serving``.
    """
    common = ["--port", "0", "--metrics-port", "-1"]
    # Libraries read their variables when they are imported.
    fresh = fresh or ENVIRONMENT != UNCHANGED
    server = Serving([*common, *args], environment=environment, fresh=fresh)
    try:
        yield server
    finally:
        server.close()
