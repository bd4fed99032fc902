"""Inputs that contradict themselves are refused, with what was got and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from infering import batch, bytes_tensor, given, parameters
from layertap.engine import Inputs, Limits, TextBatch
from layertap.errors import InvalidInputError, PermissionDeniedError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.caller import Caller
from layertap.services.infer.inputs import TakenInputs, infer_inputs
from layertap.services.infer.shared_memory_rpcs import CallerMemory
from layertap.texts import TextOptions, Truncation

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


PAIR = TakenInputs(("ids", "mask"))


def several(
    *tensors: object,
    raw: list[bytes],
    taken: TakenInputs = PAIR,
    **options: object,
) -> Inputs:
    request = pb.ModelInferRequest(model_name="net", inputs=tensors, parameters=parameters(options))
    return infer_inputs(
        request, [memoryview(each) for each in raw], NO_MEMORY, Limits(batch=4), taken=taken
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
        taken=TakenInputs(("ids", "pixel_values"), images=("pixel_values",)),
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


READER = TakenInputs(("ids", "mask", "photo"), images=("photo",), texts=("ids",))


def one_text(data: bytes, shape: Sequence[int] = (1,), **options: object) -> TextBatch:
    tensor = given("texts", "BYTES", shape, parameters=parameters(options))
    (found,) = several(tensor, raw=[data], taken=READER).texts
    return found


def test_bytes_for_an_input_of_ids_are_texts() -> None:
    """Each text has its own length in front, and may be empty or have any character."""
    texts = ["", "a cat", "žluťoučký kůň 🐎", "a\0b"]
    raw = bytes_tensor(*(text.encode() for text in texts))
    found = several(given("ids", "BYTES", [4]), raw=[raw], taken=READER)
    assert (found.tensors, found.images) == ((), ())
    assert [(each.name, list(each.texts)) for each in found.texts] == [("ids", texts)]
    contents = Contents(bytes_contents=[text.encode() for text in texts])
    typed = several(given("ids", "BYTES", [4], contents=contents), raw=[], taken=READER)
    assert typed == found


def test_texts_and_images_are_told_apart_by_their_names() -> None:
    """Both are BYTES: the model's own names decide, and otherwise the common names."""
    found = several(
        given("photo", "BYTES", [1]),
        given("texts", "BYTES", [1]),
        raw=[bytes_tensor(b"\xff\xd8"), bytes_tensor(b"a cat")],
        taken=READER,
    )
    assert [(each.name, list(each.images)) for each in found.images] == [("photo", [b"\xff\xd8"])]
    assert [(each.name, list(each.texts)) for each in found.texts] == [("", ["a cat"])]


def test_an_item_may_be_a_video_or_a_recording() -> None:
    """An input of videos takes the frames of each item; recordings are files of their own kind."""
    taken = TakenInputs(("pixels", "sound"), images=("pixels",), audio=("sound",), frames=3)
    frames = several(
        given("pixels", "BYTES", [12]), raw=[bytes_tensor(*[b"frame"] * 12)], taken=taken
    )
    assert len(frames.images[0].images) == 12
    with pytest.raises(InvalidInputError, match="got 13 images, expected at most 12"):
        several(given("pixels", "BYTES", [13]), raw=[b""], taken=taken)
    for name in ("sound", "audio"):
        found = several(given(name, "BYTES", [1]), raw=[bytes_tensor(b"fLaC")], taken=taken)
        assert [list(each.files) for each in found.audio] == [[b"fLaC"]]


def test_parameters_say_how_texts_are_tokenised() -> None:
    """Those of an input have priority over those of the request; without any, nothing is cut."""
    assert one_text(bytes_tensor(b"a")).options == TextOptions()
    mine = one_text(bytes_tensor(b"a"), truncation="start", max_tokens=9, return_tokens=True)
    assert mine.options == TextOptions(Truncation.START, 9, return_tokens=True)
    both = several(
        given("ids", "BYTES", [1], parameters=parameters({"max_tokens": 5})),
        raw=[bytes_tensor(b"a")],
        taken=READER,
        max_tokens=9,
        truncation="end",
        omit_special_tokens=True,
    )
    assert both.texts[0].options == TextOptions(Truncation.END, 5, special_tokens=False)


@pytest.mark.parametrize(
    ("data", "shape", "options", "text"),
    [
        (bytes_tensor(b"a", b"b \xff"), [2], {}, "BYTES element 1: got byte 0xff at offset 2"),
        (bytes_tensor(b"\xed\xa0\x80"), [1], {}, "expected a text in UTF-8"),
        (b"\xff\xff\xff\xffx", [1], {}, "got a length of 4294967295 with 1 bytes left"),
        (bytes_tensor(b"x"), [2], {}, "got 1 BYTES elements in 5 bytes, expected 2"),
        (bytes_tensor(b"x", b"y"), [1], {}, "got 5 bytes after 1 BYTES elements"),
        (b"", [5], {}, "got 5 texts, expected at most 4"),
        (bytes_tensor(b"x"), [1, 1], {}, "expected [N]: N texts, at least one"),
        (b"", [0], {}, "expected [N]: N texts"),
        (bytes_tensor(b"x"), [1], {"truncation": "middle"}, "expected one of none, end, start"),
        (bytes_tensor(b"x"), [1], {"truncation": 1}, "got int64_param, expected a string"),
        (bytes_tensor(b"x"), [1], {"max_tokens": -1}, "'max_tokens': got -1, expected a number"),
        (bytes_tensor(b"x"), [1], {"max_tokens": 2**31}, "'max_tokens': got 2147483648"),
        (bytes_tensor(b"x"), [1], {"max_tokens": "9"}, "expected an integer"),
        (bytes_tensor(b"x"), [1], {"return_tokens": 1}, "got int64_param, expected a boolean"),
        (bytes_tensor(b"x"), [1], {"special_tokens": True}, "'special_tokens' is not known"),
    ],
)
def test_texts_that_contradict_themselves_are_refused(
    data: bytes, shape: list, options: dict, text: str
) -> None:
    """Wrong lengths, bytes that are not UTF-8, and parameters of a wrong type or value."""
    with pytest.raises(InvalidInputError) as caught:
        one_text(data, shape, **options)
    assert text in str(caught.value)


def test_bytes_that_nothing_takes_are_refused() -> None:
    """The error lists what takes BYTES; parameters of texts need texts."""
    raw = [bytes_tensor(b"a")]
    with pytest.raises(InvalidInputError, match="'mask': got datatype BYTES, but .* send a tensor"):
        several(given("mask", "BYTES", [1]), raw=raw, taken=READER)
    with pytest.raises(InvalidInputError, match="expected 'ids', 'photo', 'texts', 'images' for"):
        several(given("words", "BYTES", [1]), raw=raw, taken=READER)
    with pytest.raises(InvalidInputError, match="got parameter 'truncation' without texts"):
        several(given("photo", "BYTES", [1]), raw=raw, taken=READER, truncation="end")


def test_shared_memory_that_is_off_is_refused() -> None:
    """The text is the one that clients of the protocol know."""
    tensor = given("input", "FP32", [1], parameters=parameters({"shared_memory_region": "r"}))
    with pytest.raises(PermissionDeniedError, match="Client shared memory is disabled"):
        read(tensor)
