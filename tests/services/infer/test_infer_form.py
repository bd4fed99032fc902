"""Replies of the Open Inference Protocol can be read by upb, and have the size of the layout."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from layertap.errors import InvalidInputError
from layertap.inference import grpc_service_pb2 as pb
from layertap.selection import Extractor
from layertap.services.infer.infer_form import InferForm, ReplyOptions
from layertap.shm.client_regions import ClientRegions
from layertap.timings import Timings

F32, F16, BF16, BOOL = 1, 2, 3, 10
TIMINGS = Timings(1_500_000, 2, 3, 1 << 50)


@pytest.fixture
def path() -> Iterator[Path]:
    """A shared memory object of 4 KiB."""
    path = Path("/dev/shm") / f"test-{secrets.token_hex(8)}"  # noqa: S108 - where they are
    path.write_bytes(bytes(4096))
    yield path
    path.unlink()


def build(form: InferForm, tensors: list, arrays: list) -> bytes:
    nbytes = form.lay_out(tensors)
    admitted: list[int] = []
    builder = form.builder(admitted.append)
    assert admitted == [nbytes + form.shared_bytes]
    for index, (dtype, array) in enumerate(arrays):
        builder.write(index, array, dtype)
    message = builder.finish(form.head(TIMINGS))
    assert len(message) == nbytes
    return message


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("size", [1, 100, 20_000])
def test_a_reply_is_what_upb_reads(streamed: bool, size: int) -> None:
    """Metadata, parameters and raw contents can be read back, for every length of the lengths."""
    x = np.arange(2 * size, dtype=np.float32).reshape(2, size)
    form = InferForm(Extractor.HOOK, options=ReplyOptions("net", "id 7", streamed=streamed))
    tensors = [("a", F32, (2, size)), ("b", F16, (size, 2)), ("c", BOOL, (3,))]
    flags = np.array([True, False, True])
    message = build(form, tensors, [(F32, x), (F32, x.T), (BOOL, flags)])
    if streamed:
        reply = pb.ModelStreamInferResponse.FromString(message)
        assert reply.error_message == ""
        response = reply.infer_response
        assert response.parameters["triton_final_response"].bool_param
    else:
        response = pb.ModelInferResponse.FromString(message)
    assert (response.model_name, response.model_version, response.id) == ("net", "1", "id 7")
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
        ("a", "FP32", [2, size]),
        ("b", "FP16", [size, 2]),
        ("c", "BOOL", [3]),
    ]
    raw = list(response.raw_output_contents)
    assert raw == [x.tobytes(), x.T.astype(np.float16).tobytes(), flags.tobytes()]
    assert response.parameters["extractor"].string_param == "hook"
    assert response.parameters["prepare_ms"].double_param == 1.5
    assert response.parameters["total_ms"].double_param == pytest.approx((1 << 50) * 1e-6)


def test_outputs_in_shared_memory_leave_an_empty_payload(path: Path) -> None:
    """They are cast and made contiguous when written; the other payloads keep their order."""
    regions = ClientRegions()
    regions.register(0, "r", path.name, 64, 1024)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    slices = {"a": regions.slice(0, "r", 0, 48), "c": regions.slice(0, "r", 100, 24)}
    form = InferForm(Extractor.FX, options=ReplyOptions("net", regions=slices))
    tensors = [("a", F32, (3, 4)), ("b", F32, (4, 3)), ("c", F16, (4, 3))]
    message = build(form, tensors, [(F32, x), (F32, x.T), (F32, x.T)])
    response = pb.ModelInferResponse.FromString(message)
    assert list(response.raw_output_contents) == [b"", x.T.tobytes(), b""]
    a, b, c = response.outputs
    assert a.parameters["shared_memory_region"].string_param == "r"
    assert a.parameters["shared_memory_byte_size"].int64_param == 48
    assert c.parameters["shared_memory_byte_size"].int64_param == 24
    assert not b.parameters
    data = path.read_bytes()
    assert data[64:112] == x.tobytes()
    assert data[164:188] == x.T.astype(np.float16).tobytes()
    assert form.shared_bytes == 48 + 24


def test_bfloat16_goes_to_shared_memory_as_its_bits(path: Path) -> None:
    """A cast to bfloat16 writes the upper halves of the float32 values."""
    regions = ClientRegions()
    regions.register(0, "r", path.name, 0, 8)
    form = InferForm(
        Extractor.HOOK, options=ReplyOptions("net", regions={"a": regions.slice(0, "r", 0, 8)})
    )
    build(form, [("a", BF16, (2,))], [(F32, np.array([1.0, -2.0], np.float32))])
    assert path.read_bytes()[:4] == b"\x80\x3f\x00\xc0"


def test_a_region_that_is_too_small_is_refused_before_any_compute(path: Path) -> None:
    """The layout shows that the output does not fit."""
    regions = ClientRegions()
    regions.register(0, "r", path.name, 0, 4096)
    form = InferForm(
        Extractor.HOOK, options=ReplyOptions("net", regions={"a": regions.slice(0, "r", 0, 15)})
    )
    with pytest.raises(InvalidInputError, match="got shared memory of 15 bytes, expected at least"):
        form.lay_out([("a", F32, (4,))])


def test_a_failed_write_is_told_at_the_end(path: Path) -> None:
    """If a region disappears meanwhile, the reply fails, but not the write during the pass."""
    regions = ClientRegions()
    regions.register(0, "r", path.name, 0, 4096)
    form = InferForm(
        Extractor.HOOK, options=ReplyOptions("net", regions={"a": regions.slice(0, "r", 0, 16)})
    )
    form.lay_out([("a", F32, (4,))])
    builder = form.builder(lambda nbytes: None)
    path.write_bytes(b"")
    builder.write(0, np.zeros(4, np.float32), F32)
    with pytest.raises(InvalidInputError, match="shorter than it was"):
        builder.finish(form.head(TIMINGS))
