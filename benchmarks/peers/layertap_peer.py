"""layertap from the command line, with the weights in a file and with `--batching auto`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from peers.given import IMAGE, ITEM, LAYERS, Announce, Ask

BATCHING = "LAYERTAP_BENCH_BATCHING"
"""The environment variable with the value of `--batching`."""


def serve(threads: int, announce: Announce) -> None:
    """Serve until standard input ends."""
    from peers.subject import save_weights

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "resnet18.pt")
        save_weights(weights)
        command = [sys.executable, "-m", "layertap", "serve", "resnet18", "--weights", str(weights)]
        command += ["--layers", ",".join(LAYERS), "--threads", str(threads), "--port", "0"]
        batching = os.environ.get(BATCHING, "auto")
        command += ["--batching", batching, "--metrics-port", "-1", "--plan-cache", "off"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    print(line, end="", flush=True)
                    if "serving" in line:
                        announce(line.split()[-1])
                        break
                sys.stdin.read()
            finally:
                process.terminate()


@contextmanager
def connect(address: str, shared_memory: bool | Literal["auto"] = "auto") -> Iterator[Ask]:
    """Yield what asks, on a connection of its own."""
    import numpy as np

    from layertap import Client, keep_memory

    keep_memory()
    with Client(address, timeout=120, shared_memory=shared_memory) as client:

        def ask(kind: str, data: bytes) -> memoryview:
            layer, sent = kind.split("-")
            x = data if sent == IMAGE else np.frombuffer(data, np.float32).reshape(-1, *ITEM)
            return client.extract("resnet18", x, layer)[layer].data.cast("B")

        yield ask
