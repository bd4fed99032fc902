"""The two ends of a peer, each a process in the peer's environment.

``python -m peers.ends serve MODULE THREADS FILE`` serves until its standard input ends, and writes
its address into the file once it is ready. ``python -m peers.ends call MODULE ADDRESS`` is a
process of callers (see ``loads``), which also compares replies with the right values.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loads import answer_orders
from peers.given import given

__all__: list[str] = []


def serve(peer: Any, threads: int, file: Path) -> None:
    """Serve until standard input ends."""

    def announce(address: str) -> None:
        whole = file.with_suffix(".part")
        whole.write_text(address, "utf-8")
        whole.rename(file)

    peer.serve(threads, announce)


@contextmanager
def connect(peer: Any, address: str, order: dict[str, Any]) -> Iterator[Callable[[], object]]:
    """Yield what makes one call of an order's kind."""
    kind, data = order["kind"], given(order["kind"], order["batch"])
    with peer.connect(address) as ask:
        yield lambda: ask(kind, data)


def check(peer: Any, address: str, order: dict[str, Any]) -> dict[str, Any]:
    """Compare all values of a reply with those of an .npy file.

    Returns:
        The reply's bytes, and the largest difference as a share of the largest magnitude; or the
        error of the call.
    """
    right, kind = np.load(order["right"]).ravel(), order["kind"]
    try:
        with peer.connect(address) as ask:
            values = np.frombuffer(ask(kind, given(kind, order["batch"])), np.float32)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the peer's client raises
        return {"error": f"{type(error).__name__}: {error}"}
    if values.shape != right.shape:
        return {"error": f"got {values.size} numbers, expected {right.size}"}
    difference = float(np.abs(values - right).max() / np.abs(right).max())
    return {"nbytes": values.nbytes, "difference": difference}


def main() -> None:
    """Be one end."""
    verb, name, *arguments = sys.argv[1:]
    warnings.filterwarnings("ignore")
    peer = importlib.import_module(f"peers.{name}")
    if verb == "serve":
        serve(peer, int(arguments[0]), Path(arguments[1]))
    else:
        (address,) = arguments
        answer_orders(
            lambda order: connect(peer, address, order),
            lambda order: check(peer, address, order),
        )


if __name__ == "__main__":
    main()
