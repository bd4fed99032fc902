"""Shared memory over a real channel: for inputs and outputs, and only for its owner."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from authorities import EXTRACT, UNKNOWN, token_file
from infering import arrays, batch, given, output, parameters, raw_request
from layertap.app.security import Security
from layertap.app.server import FeatureServer, ServerOptions
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.caller import Caller
from layertap.services.infer.shared_memory_rpcs import CallerMemory
from layertap.services.tokens import Tokens
from layertap.shm.client_regions import ClientRegions
from streams import eventually
from stubs import inference_stub

Code = grpc.StatusCode
SIZE = 1 << 16


@pytest.fixture
def path() -> Iterator[Path]:
    """A shared memory object of 64 KiB."""
    path = Path("/dev/shm") / f"test-{secrets.token_hex(8)}"  # noqa: S108 - where they are
    path.write_bytes(bytes(SIZE))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def region(stub, path: Path) -> Iterator[str]:
    """The object, registered under the name ``r``."""
    stub.SystemSharedMemoryRegister(register("r", path.name))
    yield "r"
    stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="r"))


def register(name: str, key: str, byte_size: int = SIZE) -> pb.SystemSharedMemoryRegisterRequest:
    return pb.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=byte_size)


def place(name: str, byte_size: int, offset: int = 0) -> dict[str, object]:
    """Return the parameters that select a part of a region."""
    return {
        "shared_memory_region": name,
        "shared_memory_byte_size": byte_size,
        **({"shared_memory_offset": offset} if offset else {}),
    }


def shared_request(x: np.ndarray, *outputs: object, offset: int = 0) -> pb.ModelInferRequest:
    tensor = given("input", "FP32", x.shape, parameters=parameters(place("r", x.nbytes, offset)))
    return raw_request(x, *outputs, inputs=[tensor], raw_input_contents=[])


def descriptors(path: Path) -> int:
    """Count an object's open descriptors in this process."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += fd.readlink() == path
    return found


def refusal(call: object, request: object) -> tuple[Code, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=30)
    return caught.value.code(), caught.value.details()


def test_input_and_output_go_through_shared_memory(stub, region: str, path: Path) -> None:
    """The values are the same as in messages, and the payloads are empty."""
    x = batch(2)
    expected = arrays(stub.ModelInfer(raw_request(x, output("layer1"), output("fc"))))
    with path.open("r+b") as file:
        file.seek(128)
        file.write(x.tobytes())
    size = expected["layer1"].nbytes
    response = stub.ModelInfer(
        shared_request(x, output("layer1", **place("r", size, 16384)), output("fc"), offset=128)
    )
    layer1, fc = response.outputs
    assert list(response.raw_output_contents) == [b"", expected["fc"].tobytes()]
    assert layer1.parameters["shared_memory_byte_size"].int64_param == size
    assert not fc.parameters
    got = np.frombuffer(path.read_bytes()[16384 : 16384 + size], np.float32)
    assert np.array_equal(got.reshape(layer1.shape), expected["layer1"])


@pytest.mark.parametrize(
    ("changed", "code", "text"),
    [
        (place("r", 3072, SIZE), Code.INVALID_ARGUMENT, "Invalid offset for shared memory region"),
        (place("r", SIZE, 1), Code.INVALID_ARGUMENT, "Invalid offset + byte size for shared"),
        (place("r", 3071), Code.INVALID_ARGUMENT, "unexpected total byte size 3071"),
        (place("r", 0), Code.INVALID_ARGUMENT, "unexpected total byte size 0"),
        (place("r", -1), Code.INVALID_ARGUMENT, "Invalid offset + byte size"),
        (place("r", 3072, -1), Code.INVALID_ARGUMENT, "Invalid offset for shared memory region"),
        (place("r", 2**63 - 1, 1), Code.INVALID_ARGUMENT, "Invalid offset + byte size"),
        (place("other", 3072), Code.NOT_FOUND, "Unable to find shared memory region: 'other'"),
    ],
)
def test_parts_that_are_not_there_are_refused(
    stub, region: str, changed: dict, code: Code, text: str
) -> None:
    """This holds for inputs and outputs, with the texts of Triton's server."""
    tensor = given("input", "FP32", batch().shape, parameters=parameters(changed))
    request = raw_request(inputs=[tensor], raw_input_contents=[])
    got = refusal(stub.ModelInfer, request)
    assert (got[0], text in got[1]) == (code, True), got
    if "total byte size" not in text:
        got = refusal(stub.ModelInfer, raw_request(None, output("layer1", **changed)))
        assert (got[0], text in got[1]) == (code, True), got


def test_an_output_that_does_not_fit_is_refused(stub, region: str) -> None:
    """It is refused before any compute; the text has both sizes."""
    request = raw_request(None, output("layer1", **place("r", 2047)))
    code, text = refusal(stub.ModelInfer, request)
    assert code == Code.INVALID_ARGUMENT
    assert "got shared memory of 2047 bytes, expected at least 2048" in text


def test_contents_and_shared_memory_exclude_each_other(stub, region: str) -> None:
    """An input can only be in one place."""
    request = shared_request(batch())
    request.raw_input_contents.append(batch().tobytes())
    code, text = refusal(stub.ModelInfer, request)
    assert (code, "got contents and shared memory" in text) == (Code.INVALID_ARGUMENT, True)


def test_more_than_a_request_may_have_is_not_read(stub, path: Path) -> None:
    """A huge sparse region costs the server nothing."""
    with path.open("r+b") as file:
        file.truncate(1 << 33)
    stub.SystemSharedMemoryRegister(register("r", path.name, 1 << 33))
    try:
        x = batch()
        tensor = given(
            "input", "FP32", x.shape, parameters=parameters(place("r", (1 << 33) - 1, 1))
        )
        request = raw_request(x, inputs=[tensor], raw_input_contents=[])
        code, text = refusal(stub.ModelInfer, request)
        assert (code, "expected at most 8388608" in text) == (Code.INVALID_ARGUMENT, True)
    finally:
        stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())


def test_truncation_fails_the_request_alone(stub, region: str, path: Path) -> None:
    """The server keeps running, and says what happened to the memory."""
    path.write_bytes(b"")
    code, text = refusal(stub.ModelInfer, shared_request(batch()))
    assert (code, "shorter than it was" in text) == (Code.INVALID_ARGUMENT, True)
    request = raw_request(None, output("layer1", **place("r", 2048)))
    code, text = refusal(stub.ModelInfer, request)
    assert (code, "shorter than it was" in text) == (Code.INVALID_ARGUMENT, True)
    assert path.stat().st_size == 0


def test_status_lists_what_was_registered(stub, region: str, path: Path) -> None:
    """It lists names, offsets and sizes, never the keys; an unknown name is NOT_FOUND."""
    for name in ("", "r"):
        request = pb.SystemSharedMemoryStatusRequest(name=name)
        reply = stub.SystemSharedMemoryStatus(request)
        assert list(reply.regions) == ["r"]
        status = reply.regions["r"]
        assert (status.name, status.key, status.offset, status.byte_size) == ("r", "", 0, SIZE)
    request = pb.SystemSharedMemoryStatusRequest(name="s")
    assert refusal(stub.SystemSharedMemoryStatus, request)[0] == Code.NOT_FOUND
    again = register("r", path.name)
    code, text = refusal(stub.SystemSharedMemoryRegister, again)
    assert (code, "registered already" in text) == (Code.INVALID_ARGUMENT, True)


def test_regions_belong_to_their_token(engine, path: Path, tmp_path: Path) -> None:
    """A caller with another token can't list, use or remove them."""
    file = token_file(tmp_path / "tokens", EXTRACT)
    file.write_text(f"{EXTRACT}\n{UNKNOWN}\n", "utf-8")
    security = Security(tokens=Tokens(file))
    server = FeatureServer(
        engine, ServerOptions(port=0), security=security, client_regions=ClientRegions()
    )
    server.start()
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_stub(channel)
            mine, theirs = (
                {"metadata": (("authorization", f"Bearer {token}"),), "timeout": 30}
                for token in (EXTRACT, UNKNOWN)
            )
            stub.SystemSharedMemoryRegister(register("r", path.name), **mine)
            everything = pb.SystemSharedMemoryStatusRequest()
            assert not stub.SystemSharedMemoryStatus(everything, **theirs).regions
            stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(), **theirs)
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(shared_request(batch()), **theirs)
            assert caught.value.code() == Code.NOT_FOUND
            assert list(stub.SystemSharedMemoryStatus(everything, **mine).regions) == ["r"]
            assert stub.ModelInfer(shared_request(batch()), **mine).outputs
    finally:
        server.stop(0)


def test_registering_over_and_over_leaks_nothing(stub, region: str, path: Path) -> None:
    """After 500 cycles of calls there are as many descriptors as before."""
    before = descriptors(path)
    for number in range(500):
        stub.SystemSharedMemoryRegister(register(f"r{number}", path.name))
        name = f"r{number}" if number % 2 else ""
        stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name=name))
    assert before == 1
    # gRPC's threads let go of their last call when they get to it.
    eventually(lambda: descriptors(path) == before - 1)


def test_callers_from_elsewhere_share_no_memory() -> None:
    """A server that other machines can reach opens no file for callers on them."""
    memory = CallerMemory(ClientRegions(), Caller(local=False))
    with pytest.raises(Exception, match="Client shared memory is disabled for callers from other"):
        memory.allowed()


def test_it_is_off_unless_allowed(engine, path: Path) -> None:
    """Its RPCs and requests that name a region are refused, in words that clients know."""
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_stub(channel)
            asked = [
                (stub.SystemSharedMemoryRegister, register("r", path.name)),
                (stub.SystemSharedMemoryStatus, pb.SystemSharedMemoryStatusRequest()),
                (stub.SystemSharedMemoryUnregister, pb.SystemSharedMemoryUnregisterRequest()),
                (stub.ModelInfer, shared_request(batch())),
                (stub.ModelInfer, raw_request(None, output("layer1", **place("r", 2048)))),
            ]
            for call, request in asked:
                code, text = refusal(call, request)
                assert code == Code.PERMISSION_DENIED
                assert "Client shared memory is disabled" in text
            extensions = stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
            assert "system_shared_memory" not in extensions
    finally:
        server.stop(0)


def test_cuda_memory_is_refused_kindly(stub) -> None:
    """Status and Unregister are answered, as clients call them anyway; Register says what to do."""
    assert not stub.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest()).regions
    stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest(name="any"))
    request = pb.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"x", byte_size=1)
    code, text = refusal(stub.CudaSharedMemoryRegister, request)
    assert (code, "CUDA shared memory is not supported" in text) == (Code.INVALID_ARGUMENT, True)
