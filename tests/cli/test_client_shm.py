"""``layertap serve`` lets clients share memory only where it is told to."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import grpc
import pytest

from layertap.inference import grpc_service_pb2 as pb
from layertap.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from processes import layertap, serving

NET = ("tinynets:residual", "--item-shape", "3,8,8")
SHARED = "system_shared_memory"


def test_shared_memory_is_off_until_it_is_allowed() -> None:
    """The extension is listed with the flag, and without it the register call is refused."""
    request = pb.SystemSharedMemoryRegisterRequest(name="r", key="absent", byte_size=1)
    for flags, code in (
        ((), grpc.StatusCode.PERMISSION_DENIED),
        (("--allow-client-shm",), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with serving(*NET, *flags) as server, grpc.insecure_channel(server.address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            extensions = stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
            assert (SHARED in extensions) == bool(flags)
            with pytest.raises(grpc.RpcError) as caught:
                stub.SystemSharedMemoryRegister(request)
            assert caught.value.code() == code


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_other_users_are_named() -> None:
    """Memory of a user of the list is taken."""
    path = Path("/dev/shm") / f"test-{secrets.token_hex(8)}"  # noqa: S108 - where they are
    path.write_bytes(b"1234")
    os.chown(path, 12346, -1)
    flags = ("--allow-client-shm", "--client-shm-uids", "12345,12346")
    try:
        with serving(*NET, *flags) as server, grpc.insecure_channel(server.address) as channel:
            GRPCInferenceServiceStub(channel).SystemSharedMemoryRegister(
                pb.SystemSharedMemoryRegisterRequest(name="r", key=path.name, byte_size=4)
            )
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("--client-shm-uids", "1000"), 1, "client_shm_uids: of no use without allow_client_shm"),
        (("--allow-client-shm", "--client-shm-uids", "me"), 2, "got 'me', expected numbers"),
        (("--allow-client-shm", "--client-shm-uids", "1,-2"), 2, "got '1,-2', expected numbers"),
    ],
)
def test_users_that_are_none_are_refused(flags: tuple[str, ...], code: int, text: str) -> None:
    """A list that says nothing, or is of no use, ends the start."""
    done = layertap("serve", *NET, "--port", "0", "--metrics-port", "-1", *flags)
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr
