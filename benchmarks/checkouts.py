"""A checkout of layertap: a server and a caller that run its code, each in a process of its own.

Started as a program it is the caller: it answers orders, a JSON object a line. It imports the
package of the checkout that ``Checkout`` puts into its path, and of this one only ``common``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

import common
from layertap import Client

__all__ = ["Caller", "Checkout"]

Request = Mapping[str, Any]
"""The arguments of ``Client.extract`` but the input, and ``side``, the height of the input."""


class Checkout:
    """A checkout whose extension is built.

    Args:
        path: Its root.

    Raises:
        SystemExit: It is no checkout, or its extension is not built.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        server = self._path / "server"
        self._environment = {**os.environ, "PYTHONPATH": str(server)}
        # From another folder, as the current one comes before the path.
        found = self._output("import layertap, layertap._core as c; print(c.__file__)")
        if not found.startswith(str(server)):
            raise SystemExit(
                f"{path}: got {found or 'no module layertap._core'}, expected a checkout with its "
                f"extension: run {sys.executable} setup.py build_ext --inplace in it"
            )

    @property
    def commit(self) -> str:
        """The commit that is checked out, with + if files have changed since."""
        git = ["git", "-C", str(self._path)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "server", "csrc"], check=False
        )
        return head.stdout.strip() + ("+" if changed.returncode else "")

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[str]:
        """Serve from a process of its own; yield the address once it is ready."""
        command = [sys.executable, "-W", "ignore", "-m", "layertap", "serve", *arguments]
        command += ["--port", "0", "--metrics-port", "-1", "--plan-cache", "off"]
        # To a file, as a pipe that nobody reads fills up. Appending, as we read at the same time.
        with (
            tempfile.TemporaryFile("a+") as said,
            subprocess.Popen(command, stderr=said, env=self._environment, cwd="/") as process,
        ):
            try:
                yield self._address(process, said)
            finally:
                process.terminate()

    def _address(self, process: subprocess.Popen[bytes], said: IO[str]) -> str:
        """Wait until a server is ready, and return its address."""
        while True:
            ended = process.poll() is not None
            said.seek(0)
            text = said.read()
            if found := re.search(r"serving .+ on (\S+)\n", text):
                return found[1]
            if ended:
                raise SystemExit(f"{self._path}: the server did not start\n{text}")
            time.sleep(0.1)

    @contextmanager
    def caller(self, address: str, model: str) -> Iterator[Caller]:
        """Start a caller of a model on a server."""
        command = [sys.executable, "-W", "ignore", __file__, address, model]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=self._environment, cwd="/",
        ) as process:  # fmt: skip
            yield Caller(process)

    def _output(self, code: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self._environment, cwd="/"
        )
        return done.stdout.strip()


class Caller:
    """A process that asks a server. It ends with its input.

    Args:
        process: Runs this file.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def digests(self, request: Request) -> dict[str, str]:
        """Return a digest of each tensor of the reply, by name."""
        return dict(self._ask(do="digests", request=request))

    def times(self, request: Request, calls: int) -> list[float]:
        """Return the milliseconds of each of some calls, one after the other."""
        return list(self._ask(do="times", request=request, calls=calls))

    def mix(self, requests: Sequence[Request], count: int, threads: int) -> dict[str, int]:
        """Make requests in turns from several threads, each reply compared with that of a lone one.

        Returns:
            How many there were, and how many had another digest than alone.
        """
        return dict(self._ask(do="mix", requests=requests, count=count, threads=threads))

    def _ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise SystemExit("the caller ended; its error is above")
        return json.loads(line)


class _Asking:
    """A client that runs orders."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model
        self._inputs: dict[int, np.ndarray] = {}

    def run(self, order: Mapping[str, Any]) -> object:
        if order["do"] == "digests":
            return self._digests(order["request"])
        if order["do"] == "times":
            return common.timed(lambda: self._extract(order["request"]), order["calls"])
        return self._mix(order["requests"], order["count"], order["threads"])

    def _extract(self, request: Request) -> Mapping[str, np.ndarray]:
        given = dict(request)
        side = given.pop("side")
        if side not in self._inputs:
            shape = (1, 3, side, side)
            self._inputs[side] = np.random.default_rng(0).random(shape, dtype=np.float32)
        return self._client.extract(self._model, self._inputs[side], **given)

    def _digests(self, request: Request) -> dict[str, str]:
        return {
            name: f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
            for name, array in self._extract(request).items()
        }

    def _mix(self, requests: Sequence[Request], count: int, threads: int) -> dict[str, int]:
        alone = [self._digests(request) for request in requests]
        share = -(-count // threads)

        def work(thread: int) -> int:
            wrong = 0
            for turn in range(share):
                which = (thread + turn) % len(requests)
                wrong += self._digests(requests[which]) != alone[which]
            return wrong

        with ThreadPoolExecutor(threads) as pool:
            return {"requests": share * threads, "wrong": sum(pool.map(work, range(threads)))}


def _answer(address: str, model: str) -> None:
    with Client(address, timeout=120) as client:
        client.wait_ready()
        asking = _Asking(client, model)
        while line := sys.stdin.readline():
            print(json.dumps(asking.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
