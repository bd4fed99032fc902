"""Clients may share memory only with a server that allows it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from inprocess import configured
from kept import kept
from layertap.app.server import FeatureServer
from layertap.engine import Engine
from layertap.inference import grpc_service_pb2 as pb
from processes import layertap
from stubs import inference_stub

SHARED = "system_shared_memory"


@contextmanager
def asking(*flags: str) -> Iterator[Any]:
    """Serve without a model, with the flags of `layertap serve`, and yield a stub."""
    config, _, _ = configured("a", "--port", "0", *flags)
    engine = Engine(plan_cache=kept())
    server = FeatureServer(engine, config.server)
    server.start()
    try:
        with grpc.insecure_channel(server.address) as channel:
            yield inference_stub(channel)
    finally:
        server.stop(0)
        engine.close()


def test_shared_memory_is_off_until_it_is_allowed() -> None:
    """The extension is listed only with the flag; without it, registering is refused."""
    request = pb.SystemSharedMemoryRegisterRequest(name="r", key="absent", byte_size=1)
    for flags, code in (
        ((), grpc.StatusCode.PERMISSION_DENIED),
        (("--allow-client-shm",), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with asking(*flags) as stub:
            extensions = stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
            assert (SHARED in extensions) == bool(flags)
            with pytest.raises(grpc.RpcError) as caught:
                stub.SystemSharedMemoryRegister(request)
            assert caught.value.code() == code


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_other_users_are_named() -> None:
    """Memory of a listed user is accepted, memory of another user is refused."""
    path = Path("/dev/shm") / f"test-{secrets.token_hex(8)}"  # noqa: S108 - where they are
    path.write_bytes(b"1234")
    os.chown(path, 12346, -1)
    request = pb.SystemSharedMemoryRegisterRequest(name="r", key=path.name, byte_size=4)
    try:
        with asking("--allow-client-shm", "--client-shm-uids", "12345,12346") as stub:
            stub.SystemSharedMemoryRegister(request)
        with asking("--allow-client-shm", "--client-shm-uids", "12345") as stub:
            with pytest.raises(grpc.RpcError) as caught:
                stub.SystemSharedMemoryRegister(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (
            ("--client-shm-uids", "1000"),
            1,
            "client_shm_uids: has no effect without allow_client_shm",
        ),
        (("--allow-client-shm", "--client-shm-uids", "me"), 2, "got 'me', expected numbers"),
        (("--allow-client-shm", "--client-shm-uids", "1,-2"), 2, "got '1,-2', expected numbers"),
    ],
)
def test_users_that_are_none_are_refused(flags: tuple[str, ...], code: int, text: str) -> None:
    """An empty or useless list ends the start with an error."""
    done = layertap("serve", "resnet18", *flags)
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr
