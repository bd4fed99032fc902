"""Requests of several inputs, through a server in both protocols, beside fresh modules."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

import severalnets
from infering import given
from kept import kept
from layertap import Client
from layertap.engine import Engine
from layertap.errors import InvalidInputError
from layertap.inference import grpc_service_pb2 as pb
from layertap.local import load
from layertap.models import ModelSpec
from serving import running_server
from stubs import inference_stub

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]])
MASK = (IDS != 0).long()
SHAPES = {"optional": (6,), "masked": (6,), "two_images": (3, 8, 8), "takes_dict": None}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of models that take several inputs."""
    engine = Engine(plan_cache=kept())
    for net, shape in SHAPES.items():
        engine.load(ModelSpec(f"severalnets:{net}", item_shape=shape))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def fresh(net: str, *args: torch.Tensor, **kwargs: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return getattr(severalnets, net)()(*args, **kwargs).numpy()


def close(got: Mapping[str, np.ndarray], expected: np.ndarray) -> bool:
    return np.allclose(got["head"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extractor", ["auto", "hook", "torchscript"])
def test_a_mask_changes_the_answer(client: Client, extractor: str) -> None:
    """With the mask and without it, each answer is that of a fresh module called so."""
    named = {"input_ids": IDS, "attention_mask": MASK}
    with_mask = client.extract("optional", named, "head", extractor=extractor)
    without = client.extract("optional", {"input_ids": IDS}, "head", extractor=extractor)
    unnamed = client.extract("optional", IDS, "head", extractor=extractor)
    assert close(with_mask, fresh("optional", IDS, MASK))
    assert close(without, fresh("optional", IDS))
    assert close(unnamed, fresh("optional", IDS))
    assert not close(with_mask, fresh("optional", IDS))


def test_a_layer_that_runs_for_an_optional_input_only(client: Client) -> None:
    """With the input its values come; without it the error says that it did not run."""
    types = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    named = {"input_ids": IDS, "token_type_ids": types}
    got = client.extract("optional", named, "types", extractor="hook")["types"]
    assert np.array_equal(got, severalnets.optional().types(types).detach().numpy())
    with pytest.raises(Exception, match="types.* did not run"):
        client.extract("optional", {"input_ids": IDS}, "types", extractor="hook")


def test_members_of_a_dict_are_inputs_of_their_own(client: Client) -> None:
    """Names with dots lead into the argument."""
    named = {"features.input_ids": IDS, "features.mask": MASK}
    expected = fresh("takes_dict", {"input_ids": IDS, "mask": MASK})  # type: ignore[arg-type]
    assert close(client.extract("takes_dict", named, "head"), expected)


def test_a_stream_takes_several_inputs(client: Client) -> None:
    """Items with and without the optional input, in one stream."""
    items = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS}]
    got = list(client.extract_many("optional", items, "head"))
    assert close(got[0], fresh("optional", IDS, MASK))
    assert close(got[1], fresh("optional", IDS))


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"input_ids": IDS}, "got 'input_ids' without 'attention_mask'"),
        (IDS, "got a tensor without a name, expected a name for each"),
        (
            {"input_ids": IDS, "attention_msk": MASK},
            "got 'attention_msk' \\(did you mean 'attention_mask'\\?\\)",
        ),
        ({"input_ids": IDS, "attention_mask": MASK[:1]}, "batches of 2 of 'input_ids', 1 of"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :3]},
            "with sequence 3, expected 4, as 'input_ids'",
        ),
        ({"input_ids": IDS, "attention_mask": MASK.float()}, "got dtype float32, expected int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(client: Client, batch: object, text: str) -> None:
    """Left out, unnamed, misspelt, another batch, another length, another type."""
    with pytest.raises(InvalidInputError, match=text):
        client.extract("masked", batch, "head")


def picture(seed: int, width: int = 10, height: int = 9) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_two_inputs_may_be_images(client: Client) -> None:
    """Images for both, or images for one and numbers for the other, give the same values."""
    one, two = picture(1), picture(2)
    both = client.extract("two_images", {"image1": [one], "image2": [two]}, "conv:input")
    stacked = both["conv:input"]
    assert stacked.shape == (1, 6, 8, 8)
    mixed = client.extract("two_images", {"image1": stacked[:, :3].copy(), "image2": [two]},
                           "conv:input")  # fmt: skip
    assert np.array_equal(mixed["conv:input"], stacked)
    black = {"image1": np.zeros((1, 3, 8, 8), np.float32), "image2": [two]}
    first = client.extract("two_images", black, "conv:input")["conv:input"]
    assert not first[:, :3].any()
    assert np.array_equal(first[:, 3:], stacked[:, 3:])
    with pytest.raises(InvalidInputError, match="for input '', expected 'image1' or 'image2'"):
        client.extract("two_images", [one], "conv")
    with pytest.raises(InvalidInputError, match="batches of 1 of the images of 'image1', 2 of"):
        client.extract("two_images", {"image1": [one], "image2": [one, two]}, "conv")
    with pytest.raises(InvalidInputError, match="without 'image2'"):
        client.extract("two_images", {"image1": [one]}, "conv")


def test_describe_model_shows_the_inputs(client: Client) -> None:
    """Names, types, free dimensions, and which are optional or may be images."""
    inputs = client.describe_model("optional").model.inputs
    assert [(each.name, each.optional) for each in inputs] == [
        ("input_ids", False),
        ("attention_mask", True),
        ("token_type_ids", True),
    ]
    assert [dimension.free for dimension in inputs[1].shape] == ["", "sequence"]
    images = client.describe_model("two_images").model.inputs
    assert [each.images for each in images] == [True, True]


def test_open_inference_takes_several_inputs(address: str) -> None:
    """By the model's own names, optional ones too; the metadata has them, free sizes as -1."""
    with grpc.insecure_channel(address) as channel:
        stub = inference_stub(channel)
        metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="optional"))
        assert [(each.name, each.datatype, list(each.shape)) for each in metadata.inputs] == [
            ("input_ids", "INT64", [-1, -1]),
            ("attention_mask", "INT64", [-1, -1]),
            ("token_type_ids", "INT64", [-1, -1]),
        ]
        config = stub.ModelConfig(pb.ModelConfigRequest(name="optional")).config
        assert [each.optional for each in config.input] == [False, True, True]
        request = pb.ModelInferRequest(
            model_name="optional",
            inputs=[given("attention_mask", "INT64", [2, 4]), given("input_ids", "INT64", [2, 4])],
            outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="head")],
            raw_input_contents=[MASK.numpy().tobytes(), IDS.numpy().tobytes()],
        )
        reply = stub.ModelInfer(request)
    head = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(2, 4)
    assert close({"head": head}, fresh("optional", IDS, MASK))


def test_several_inputs_in_this_process() -> None:
    """``layertap.load`` takes the declaration and the same mapping of names to tensors."""
    inputs = {
        "input_ids": "int64 [sequence=6], ids=50",
        "attention_mask": "int64 [sequence=6], mask",
    }
    with load("severalnets:masked", inputs=inputs) as model:
        named = {"input_ids": IDS, "attention_mask": MASK}
        got = model.extract(named, "head", extractor="hook")
        assert model.signature.pattern == "input_ids [B, sequence], attention_mask [B, sequence]"
    assert close({"head": got["head"].numpy()}, fresh("masked", IDS, MASK))
