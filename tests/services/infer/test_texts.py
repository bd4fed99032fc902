"""Texts as BYTES over a real channel give the native protocol's values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest

import hfnets
from hostile import mutated
from infering import arrays, bytes_tensor, given, output, parameters, run_tritonclient
from kept import kept
from layertap import Client, Texts
from layertap.engine import Engine, Limits
from layertap.inference import grpc_service_pb2 as pb
from layertap.models import ModelSpec
from serving import running_server
from stubs import inference_stub

TEXTS = ["the cat sat on the mat.", "a bird flew"]
LAYER = "encoder.layer.0"
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a small BERT with its tokenizer, and of one without."""
    folder = tmp_path_factory.mktemp("models")
    engine = Engine(Limits(text_bytes=2000, batch=8), plan_cache=kept())
    engine.load(ModelSpec(f"hf:{hfnets.wordpiece(hfnets.bert(folder / 'bert'))}"))
    engine.load(ModelSpec(f"hf:{hfnets.bert(folder / 'plain')}"))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.fixture(scope="module")
def stub(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield inference_stub(channel)


def request(
    *texts: bytes, name: str = "texts", model: str = "bert", **options: object
) -> pb.ModelInferRequest:
    """Return a request for a layer by HOOK, with texts in their raw form."""
    return pb.ModelInferRequest(
        model_name=model,
        inputs=[given(name, "BYTES", [len(texts)])],
        outputs=[output(LAYER)],
        raw_input_contents=[bytes_tensor(*texts)],
        parameters=parameters({"extractor": "hook", **options}),
    )


def refusal(stub: Any, message: pb.ModelInferRequest) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(message, timeout=30)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    return str(caught.value.details())


@pytest.mark.parametrize("name", ["texts", "input_ids"])
def test_values_and_tokens_are_those_of_the_native_protocol(
    stub: Any, address: str, name: str
) -> None:
    """Under the common name and the model's own, with the tokens where they are asked for."""
    encoded = [text.encode() for text in TEXTS]
    got = arrays(stub.ModelInfer(request(*encoded, name=name, return_tokens=True)))
    with Client(address) as client:
        features = client.extract("bert", Texts(TEXTS, return_tokens=True), LAYER, extractor="hook")
    assert list(got) == list(features)
    assert all(np.array_equal(got[each], features[each]) for each in features)
    assert got["tokens.ids"].shape == (2, 9)


def test_options_are_those_of_the_native_protocol(stub: Any, address: str) -> None:
    """Texts are cut and special tokens left out as the parameters say."""
    options = {"truncation": "start", "max_tokens": 3, "omit_special_tokens": True}
    got = arrays(stub.ModelInfer(request(TEXTS[0].encode(), **options)))
    given = Texts(TEXTS[0], truncation="start", max_tokens=3, special_tokens=False)
    with Client(address) as client:
        expected = client.extract("bert", given, LAYER, extractor="hook")
    assert got[LAYER].shape == (1, 3, 32)
    assert np.array_equal(got[LAYER], expected[LAYER])


def test_metadata_lists_texts_beside_the_ids(stub: Any) -> None:
    """BYTES with one free dimension, optional in the configuration; only with a tokenizer."""
    inputs = stub.ModelMetadata(pb.ModelMetadataRequest(name="bert")).inputs
    rows = {each.name: (each.datatype, list(each.shape)) for each in inputs}
    assert rows["input_ids"] == ("INT64", [-1, -1])
    assert rows["texts"] == ("BYTES", [-1])
    config = stub.ModelConfig(pb.ModelConfigRequest(name="bert")).config
    last = config.input[-1]
    assert (last.name, last.data_type, list(last.dims), last.optional) == ("texts", 13, [], True)
    assert config.parameters["texts"].string_value == "input_ids"
    assert "at most 32 tokens" in config.parameters["tokenization"].string_value
    plain = stub.ModelMetadata(pb.ModelMetadataRequest(name="plain")).inputs
    assert "texts" not in {each.name for each in plain}
    output_shape = stub.ModelMetadata(pb.ModelMetadataRequest(name="bert")).outputs[0].shape
    assert output_shape[0] == -1


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (request(b"a", b"\xff"), "input 'texts': BYTES element 1: got byte 0xff at offset 0"),
        (request(b"a", b""), "texts[1]: got an empty text"),
        (request(b"a cat " * 40), "texts[0]: got 82 tokens, expected at most 32"),
        (request(b"a " * 2000), "got 4000 bytes in all, expected at most 2000"),
        (request(*[b"a"] * 9), "got 9 texts, expected at most 8"),
        (request(b"a", model="plain"), "texts: model 'plain' takes none, as it has no tokenizer"),
        (
            request(b"a", model="plain", name="input_ids"),
            "takes neither texts nor images nor audio",
        ),
        (
            request(b"a", name="attention_mask"),
            "takes neither texts nor images nor audio; send a tensor",
        ),
    ],
)
def test_texts_that_can_not_be_taken(stub: Any, message: pb.ModelInferRequest, text: str) -> None:
    """Each error says what was sent and what was expected."""
    assert text in refusal(stub, message)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("input_ids", "input 'input_ids': got a tensor and texts, expected it once"),
        ("attention_mask", "got 'attention_mask' and texts for 'input_ids', expected one of them"),
    ],
)
def test_texts_and_what_is_made_of_them_are_refused(stub: Any, name: str, text: str) -> None:
    """A request has texts, or ids with their mask."""
    message = request(b"a cat")
    message.inputs.append(given(name, "INT64", [1, 4]))
    message.raw_input_contents.append(np.ones((1, 4), np.int64).tobytes())
    assert text in refusal(stub, message)


def test_mutated_requests_are_answered_or_refused(address: str, stub: Any) -> None:
    """Texts with changes at any depth are answered, or refused with a reason."""
    random = Random(5)
    good = [
        request(b"a cat", b"a bird flew", truncation="end", max_tokens=4).SerializeToString(),
        request("kůň".encode(), name="input_ids", return_tokens=True).SerializeToString(),
    ]
    codes = set()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(400):
            try:
                call(mutated(random, random.choice(good)), timeout=30)
                codes.add(Code.OK)
            except grpc.RpcError as error:
                codes.add(error.code())
    assert {Code.OK, Code.INVALID_ARGUMENT} <= codes
    assert codes <= {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION,
                     Code.OUT_OF_RANGE, Code.DEADLINE_EXCEEDED}  # fmt: skip
    assert arrays(stub.ModelInfer(request(b"a cat")))[LAYER].shape == (1, 4, 32)


def test_a_stream_takes_texts(stub: Any) -> None:
    """Items of a stream are texts as those of a request are; a wrong one fails alone."""
    items = [request(b"a cat"), request(b"\xff"), request(b"a bird")]
    first, wrong, last = stub.ModelStreamInfer(iter(items))
    assert "expected a text in UTF-8" in wrong.error_message
    for reply, item in ((first, items[0]), (last, items[2])):
        expected = arrays(stub.ModelInfer(item))[LAYER]
        assert np.array_equal(arrays(reply.infer_response)[LAYER], expected)


def test_tritonclient_sends_texts(address: str, tmp_path: Path) -> None:
    """NVIDIA's own client, unmodified, sends texts and gets the native values."""
    file = tmp_path / "states.npy"
    run_tritonclient("texts.py", address, file)
    with Client(address) as client:
        expected = client.extract("bert", Texts(TEXTS), LAYER, extractor="hook")[LAYER]
    assert np.array_equal(np.load(file), expected)
