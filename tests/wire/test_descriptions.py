"""Descriptions survive conversion to a message; their JSON is protobuf's for that message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from layertap.description import (
    Dimension,
    ImageDescription,
    InputDescription,
    ItemDescription,
    LayerDescription,
    ModelDescription,
    PassDescription,
    RefusedPlanDescription,
    ValueDescription,
)
from layertap.selection import Capture, Extractor
from layertap.v1 import feature_service_pb2
from layertap.wire.description_json import description_to_json
from layertap.wire.descriptions import (
    description_from_proto,
    description_to_proto,
    model_to_proto,
)

VALUE = ValueDescription(
    "float16",
    (Dimension(2, batch=True), Dimension(8, expression="ceil(H/28)"), Dimension(4, varies=True)),
    2**40,
    dynamic=True,
    interleaved=True,
)
STEPS = ImageDescription(
    color="rgb",
    exif_orientation=True,
    resize=(256,),
    resize_mode="short side",
    interpolation="bilinear",
    crop=(224, 192),
    mean=(0.485, 0.456, 0.406),
    std=(1.0,),
    origin="the test's configuration",
    assumed=("image_crop", "image_std"),
)
FULL = ModelDescription(
    name="net",
    source="factory:nets:net",
    weights="random",
    device="cuda:1",
    inputs=(
        InputDescription(
            "x",
            "float32",
            (Dimension(1, batch=True), Dimension(3), Dimension(224, free="H")),
            images=STEPS,
            preprocessing="resized",
            optional=True,
            texts=True,
            tokenization="the folder's own tokenizer",
            sampling_rate=16000,
            audio_preprocessing="the folder's own feature extractor",
        ),
        InputDescription(
            "ids", "int64", (Dimension(1, batch=True),), texts=True, tokenization="by words"
        ),
        InputDescription(
            "own",
            "float32",
            (Dimension(1, batch=True), Dimension(3)),
            images=ImageDescription(color="gray", exif_orientation=False, custom="my_transform"),
        ),
    ),
    layers=(
        LayerDescription(
            "layer1",
            "Sequential",
            calls=2,
            values={Capture.OUTPUT: VALUE, Capture.INPUT: replace(VALUE, quantized="quint8")},
            refusals={
                Extractor.HOOK: {Capture.OUTPUT: "", Capture.INPUT: "no tensor"},
                Extractor.TORCHSCRIPT: {Capture.OUTPUT: "it branches", Capture.INPUT: ""},
            },
            stride=2.5,
            channels=64,
            layout="tokens",
            grid=(7, 14),
            front_tokens=1,
            is_result=True,
        ),
        LayerDescription("add", "add", is_node=True, calls=0, same_as="layer1"),
    ),
    passes=PassDescription(early_stop=True, concurrent=True, shared=True, state="reset"),
    notes=("it draws random numbers",),
    declared_layers=("layer1", "add:input"),
    variants={Extractor.TORCHSCRIPT: ("channels_last", "another"), Extractor.EXPORT: ("third",)},
    fingerprint="0123abcd",
    refused_plans=(
        RefusedPlanDescription(
            Extractor.FX, ("layer1:input",), (ItemDescription("x", "bool", (3, 0)),), "it breaks"
        ),
    ),
)
LAYOUTS = ["", "channels_first", "channels_last", "tokens"]
CASES = {
    "full": FULL,
    "empty": ModelDescription("", "", "", "", (), ()),
    **{
        f"state {state}": replace(FULL, passes=PassDescription(False, False, False, state))
        for state in ("none", "reset", "kept")
    },
    **{
        f"layout {layout!r}": replace(FULL, layers=(LayerDescription("a", "b", layout=layout),))
        for layout in LAYOUTS
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_description_survives_its_message(case: str) -> None:
    """What a server says of a model arrives as it was, whichever fields are set."""
    response = description_to_proto(CASES[case])
    sent = feature_service_pb2.DescribeModelResponse.FromString(response.SerializeToString())
    assert description_from_proto(sent) == CASES[case]
    assert model_to_proto(CASES[case]) == response.model


@pytest.mark.parametrize("case", CASES)
def test_the_json_is_protobufs(case: str) -> None:
    """JSON that is made without protobuf is the JSON that protobuf makes of the message."""
    expected = MessageToJson(description_to_proto(CASES[case]), preserving_proto_field_name=True)
    assert description_to_json(CASES[case]) == json.loads(expected)


def test_every_field_of_the_messages_is_tried() -> None:
    """Each field that a description's messages have is set in the case above.

    So a field that is added to the contract, and forgotten here, is found.
    """
    set_fields: dict[object, set[str]] = {}
    for message in walk(description_to_proto(FULL)):
        names = {field.name for field, _ in message.ListFields()}
        set_fields.setdefault(message.DESCRIPTOR, set()).update(names)
    assert {
        f"{kind.full_name}.{name}"
        for kind, names in set_fields.items()
        for name in set(kind.fields_by_name) - names
    } == set()


def walk(message: Message) -> Iterator[Message]:
    """Yield a message and those within it."""
    yield message
    for _, value in message.ListFields():
        members = [value] if isinstance(value, Message) else value
        if isinstance(members, Iterable):
            for each in members:
                if isinstance(each, Message):
                    yield from walk(each)


def test_a_type_that_the_protocol_lacks_is_left_out() -> None:
    """A complex value has no element type in the message, and none in the JSON."""
    value = replace(VALUE, dtype="complex64")
    model = replace(FULL, layers=(LayerDescription("a", "b", values={Capture.OUTPUT: value}),))
    response = description_to_proto(model)
    assert response.layers[0].output.dtype == 0
    assert description_from_proto(response).layers[0].output == replace(value, dtype="?")
    expected = json.loads(MessageToJson(response, preserving_proto_field_name=True))
    assert description_to_json(model) == expected
    assert description_to_json(description_from_proto(response)) == expected


def test_what_a_newer_server_says_is_no_error() -> None:
    """A layout, a kind of state and a missing reason that this version doesn't know are shown."""
    response = description_to_proto(FULL)
    layer = response.layers[0]
    layer.layout = 99
    response.model.pass_rules.state = 99
    del layer.extractors[1:]
    layer.extractors[0].captures[1].reason = ""
    description = description_from_proto(response)
    assert description.layers[0].layout == ""
    assert description.passes == PassDescription(True, True, True, "")
    assert description.layers[0].refusals == {
        Extractor.HOOK: {Capture.OUTPUT: "", Capture.INPUT: "the server does not say why"}
    }
