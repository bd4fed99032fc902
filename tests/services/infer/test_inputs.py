"""Inputs that contradict themselves are refused, with what was got and what was expected."""

from __future__ import annotations

import numpy as np
import pytest

from infering import batch, bytes_tensor, given, parameters
from layertap.engine import Inputs, Limits
from layertap.errors import InvalidInputError, PermissionDeniedError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.caller import Caller
from layertap.services.infer.inputs import infer_inputs
from layertap.services.infer.shared_memory_rpcs import CallerMemory

NO_MEMORY = CallerMemory(None, Caller(local=True))
Contents = pb.InferTensorContents


def read(tensor: object, *raw: bytes) -> Inputs:
    request = pb.ModelInferRequest(model_name="net", inputs=[tensor])
    return infer_inputs(request, [memoryview(each) for each in raw], NO_MEMORY, Limits(batch=4))


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("FP32", "fp32_contents", [1.5, -2.0]),
        ("FP64", "fp64_contents", [1e300, -0.1]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-(2**15), 2**15 - 1]),
        ("INT32", "int_contents", [-(2**31), 2**31 - 1]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("UINT8", "uint_contents", [0, 255]),
        ("BOOL", "bool_contents", [True, False]),
    ],
)
def test_typed_and_raw_are_one(datatype: str, field: str, values: list) -> None:
    """For each datatype, typed contents equal the raw bytes, at both ends of its range."""
    typed = read(given("input", datatype, [2], contents=Contents(**{field: values})))
    data = bytes(typed.tensors[0].data)
    raw = read(given("input", datatype, [2]), data)
    assert typed.tensors[0].dtype == raw.tensors[0].dtype
    assert np.array_equal(raw.tensors[0].array(), np.array(values, raw.tensors[0].dtype.numpy))
    assert bytes(raw.tensors[0].data) == data


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_is_raw_only(datatype: str) -> None:
    """Types of two bytes are accepted as raw contents; typed contents have no field for them."""
    view = read(given("input", datatype, [1, 2]), b"\x00\x3c\x00\xc0").tensors[0]
    assert (view.dtype.datatype, view.shape) == (datatype, (1, 2))
    with pytest.raises(InvalidInputError, match=f"{datatype} has no typed contents"):
        read(given("input", datatype, [1], contents=Contents(fp32_contents=[1.0])))


def test_raw_contents_are_not_copied() -> None:
    """The tensor is a view of the received bytes."""
    data = batch().tobytes()
    view = read(given("input", "FP32", batch().shape), data).tensors[0]
    assert view.data.obj is data


@pytest.mark.parametrize(
    ("tensor", "raw", "text"),
    [
        (given("input", "FP32", [2]), [], "got no data, expected raw_input_contents"),
        (given("input", "FP32", [2]), [b"12345678", b""], "raw_input_contents: got 2, expected 1"),
        (
            given("input", "FP32", [2]),
            [b"1234567"],
            "unexpected total byte size 7 for input 'input', expecting 8",
        ),
        (given("input", "FP32", [2]), [b"123456789"], "unexpected total byte size 9"),
        (given("input", "FP32", [-1]), [b"1234"], "shape: got [-1], a negative size"),
        (given("input", "FP32", [2**62, 4]), [b"1234"], "more than a message holds"),
        (given("input", "FP32", [2**62, 4, 0]), [b""], "more than a message holds"),
        (given("input", "FP32", [1] * 33), [b"1234"], "got rank 33, expected at most 32"),
        (given("input", "fp32", [1]), [b"1234"], "datatype: got 'fp32', expected one of FP32"),
        (given("input", "UINT16", [1]), [b"12"], "datatype: got 'UINT16'"),
        (given("input", "BOOL", [2]), [b"\x01\x02"], "got a byte above 1 in BOOL"),
        (
            given("data", "FP32", [1]),
            [b"1234"],
            "unexpected inference input 'data' for model 'net'",
        ),
        (given("images", "FP32", [1]), [b"1234"], "unexpected inference input 'images'"),
        (given("input", "BYTES", [1]), [bytes_tensor(b"x")], "expected 'images' for datatype"),
        (
            given("input", "FP32", [1], contents=Contents(fp32_contents=[1.0])),
            [b"1234"],
            "contents field must not be specified when using raw_input_contents",
        ),
        (
            given("input", "FP32", [2], contents=Contents(fp32_contents=[1.0])),
            [],
            "fp32_contents: got 1 elements, expected 2 for shape [2]",
        ),
        (
            given("input", "FP32", [1], contents=Contents(fp64_contents=[1.0])),
            [],
            "contents: got fp64_contents, expected fp32_contents for FP32",
        ),
        (
            given("input", "FP32", [1], contents=Contents(fp32_contents=[1], int_contents=[1])),
            [],
            "contents: got int_contents, expected fp32_contents",
        ),
        (
            given("input", "INT8", [1], contents=Contents(int_contents=[128])),
            [],
            "got 128 to 128, expected -128 to 127 for INT8",
        ),
        (
            given("input", "FP32", [1], parameters=parameters({"layout": "NCHW"})),
            [b"1234"],
            "parameter 'layout' is not known",
        ),
        (
            given("input", "FP32", [1], parameters=parameters({"shared_memory_byte_size": 4})),
            [],
            "parameter 'shared_memory_region': expected a region's name",
        ),
        (
            given("input", "FP32", [1], parameters=parameters({"shared_memory_region": 4})),
            [],
            "got int64_param, expected a string",
        ),
    ],
)
def test_contradictions_are_refused(tensor: object, raw: list, text: str) -> None:
    """No data, too much data, the wrong type, and both kinds at once are refused."""
    with pytest.raises(InvalidInputError) as caught:
        read(tensor, *raw)
    assert text in str(caught.value)


def several(*tensors: object, raw: list[bytes], names: tuple[str, ...] = ("ids", "mask")) -> Inputs:
    request = pb.ModelInferRequest(model_name="net", inputs=tensors)
    return infer_inputs(
        request, [memoryview(each) for each in raw], NO_MEMORY, Limits(batch=4), names=names
    )


def test_several_inputs_take_their_raw_contents_in_order() -> None:
    """Each input has the model's own name, and the bytes at its own place in the list."""
    found = several(
        given("mask", "BOOL", [1, 2]), given("ids", "INT8", [1, 3]), raw=[b"\1\0", b"\7\x08\x09"]
    )
    values = {view.name: view.array().tolist() for view in found.tensors}
    assert values == {"mask": [[True, False]], "ids": [[7, 8, 9]]}


def test_tensors_and_images_stand_side_by_side() -> None:
    """Encoded images for one input, numbers for another."""
    found = several(
        given("ids", "INT8", [1, 1]),
        given("pixel_values", "BYTES", [1]),
        raw=[b"\1", bytes_tensor(b"photo")],
        names=("ids", "pixel_values"),
    )
    assert [view.name for view in found.tensors] == ["ids"]
    assert [(each.name, list(each.images)) for each in found.images] == [
        ("pixel_values", [b"photo"])
    ]


@pytest.mark.parametrize(
    ("tensors", "raw", "text"),
    [
        ([], [], "inputs: got none, expected at least one"),
        ([given("ids", "INT8", [1])] * 65, [b"1"] * 64, "inputs: got 65, expected at most 64"),
        (
            [given("ids", "INT8", [1]), given("mask", "INT8", [1])],
            [b"1"],
            "input 'mask': got no data, expected raw_input_contents",
        ),
        (
            [given("ids", "INT8", [1]), given("mask", "INT8", [1])],
            [b"1"] * 3,
            "raw_input_contents: got 3, expected 2 for 2 inputs",
        ),
        (
            [given("msk", "INT8", [1])],
            [b"1"],
            "unexpected inference input 'msk' for model 'net', expected 'ids', 'mask', 'input'",
        ),
    ],
)
def test_inputs_that_do_not_add_up_are_refused(tensors: list, raw: list, text: str) -> None:
    """None, too many, too few or too many contents, and a name that the model does not have."""
    with pytest.raises(InvalidInputError) as caught:
        several(*tensors, raw=raw)
    assert text in str(caught.value)


@pytest.mark.parametrize("typed", [False, True])
def test_images_are_taken_apart(typed: bool) -> None:
    """Byte strings are split correctly, including empty ones."""
    photos = [b"first", b"", b"third"]
    if typed:
        tensor = given("images", "BYTES", [3], contents=Contents(bytes_contents=photos))
        assert list(read(tensor).images[0].images) == photos
    else:
        raw = bytes_tensor(*photos)
        assert list(read(given("images", "BYTES", [3]), raw).images[0].images) == photos


@pytest.mark.parametrize(
    ("shape", "data", "text"),
    [
        ([], b"", "shape: got [], expected [N]"),
        ([0], b"", "shape: got [0], expected [N]"),
        ([1, 1], bytes_tensor(b"x"), "shape: got [1, 1], expected [N]"),
        ([5], b"", "got 5 images, expected at most 4"),
        ([2], bytes_tensor(b"x"), "got 1 BYTES elements in 5 bytes, expected 2"),
        ([1], bytes_tensor(b"x", b"y"), "got 5 bytes after 1 BYTES elements"),
        ([1], b"\x02\x00\x00\x00x", "got a length of 2 with 1 bytes left"),
        ([1], b"\xff\xff\xff\xffx", "got a length of 4294967295 with 1 bytes left"),
        ([1], b"\x00\x00\x00", "got 0 BYTES elements in 3 bytes, expected 1"),
    ],
)
def test_images_that_contradict_their_shape_are_refused(
    shape: list, data: bytes, text: str
) -> None:
    """Wrong lengths, and shapes that are not a list, are refused."""
    with pytest.raises(InvalidInputError) as caught:
        read(given("images", "BYTES", shape), data)
    assert text in str(caught.value)


def test_shared_memory_that_is_off_is_refused() -> None:
    """The text is the one that clients of the protocol know."""
    tensor = given("input", "FP32", [1], parameters=parameters({"shared_memory_region": "r"}))
    with pytest.raises(PermissionDeniedError, match="Client shared memory is disabled"):
        read(tensor)
