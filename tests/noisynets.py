"""Factories that write to stderr and stdout in all the ways that model code may."""

from __future__ import annotations

import os
import threading
import warnings

from torch import nn


class _Fails:
    def __del__(self) -> None:
        raise ValueError("in a destructor")


def noisy() -> nn.Module:
    """Print, warn, fail in a thread and in a destructor, and write past Python."""
    print("printed text", flush=True)  # noqa: T201 - what a model's code may do
    os.write(2, "native text é\n".encode())
    warnings.warn("a model's warning", UserWarning, stacklevel=1)

    def fail() -> None:
        raise ValueError("in a thread")

    thread = threading.Thread(target=fail, name="noisy-thread")
    thread.start()
    thread.join()
    _Fails()
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def aborts() -> nn.Module:
    """End the process like C++ does, with an unfinished last line."""
    os.write(2, b"terminate called after throwing an instance of 'noisy'")
    os.abort()
