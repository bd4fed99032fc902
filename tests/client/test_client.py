"""The client sends requests, unpacks replies without copying, and raises the server's errors."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

import layertap
from kept import kept
from layertap import Client, LayerSelection, StreamRequest, errors
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server
from tinynets import ITEM

PHOTO = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a net that also takes images, and a slow net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("slownets:sleepy", item_shape=(3, 4, 4)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    """A client of a real server."""
    with running_server(engine) as address, Client(address) as client:
        yield client


ONE_SECOND = np.full((1, 3, 4, 4), 1000, np.float32)


def batch(size: int = 1) -> np.ndarray:
    return np.random.default_rng(1).random((size, *ITEM), dtype=np.float32)


def test_arrays_are_views_of_one_message(client) -> None:
    """The layers share the received bytes, are read-only, and outlive the client's channel."""
    features = client.extract("residual", batch(2), ["bn1", "layer1"])
    first, again = features["layer1"], features["layer1"]
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    assert first.ctypes.data % first.itemsize == 0
    assert len(features) == 2
    assert "layer1: float32[2, 8, 8, 8]" in repr(features)


def test_torch_tensors_share_the_message(client) -> None:
    """Torch tensors share the same memory, without a copy."""
    features = client.extract("residual", batch(2), ["bn1", "layer1"])
    tensors = features.torch()
    assert tensors["layer1"].data_ptr() == features["layer1"].ctypes.data
    assert torch.equal(tensors["bn1"], torch.from_numpy(features["bn1"].copy()))


@pytest.mark.parametrize(
    "layers",
    [
        "layer1=deep",
        ["layer1=deep"],
        {"layer1": "deep"},
        LayerSelection("layer1", alias="deep"),
        [LayerSelection("layer1", alias="deep")],
    ],
)
def test_layers_may_be_written_in_several_ways(client, layers) -> None:
    """A text, a selection, a list of either and a mapping to aliases select the same layer."""
    assert list(client.extract("residual", batch(), layers)) == ["deep"]


def test_every_kind_of_image_is_the_same_image(client) -> None:
    """A path, its text, the file's bytes and the decoded image give the same layers."""
    with Image.open(PHOTO) as image:
        decoded = image.convert("RGB")
    values = [
        client.extract("residual", given, "avgpool", extractor="hook")["avgpool"]
        for given in (PHOTO, str(PHOTO), PHOTO.read_bytes(), decoded, [decoded])
    ]
    assert all(np.array_equal(value, values[0]) for value in values)


def test_decoded_images_are_sent_as_what_the_server_makes_of_their_files(client) -> None:
    """PNG has no CMYK, which many photos use, so the client converts them to the server's RGB."""
    encoded = io.BytesIO()
    with Image.open(PHOTO) as image:
        image.convert("CMYK").save(encoded, "JPEG")
    with Image.open(encoded) as decoded:
        assert decoded.mode == "CMYK"
        got, expected = (
            client.extract("residual", given, "avgpool", extractor="hook")["avgpool"]
            for given in (decoded, encoded.getvalue())
        )
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("size", [400, 20_000])
def test_an_image_that_cannot_be_encoded_is_refused(client, size) -> None:
    """A PIL mode that PNG lacks, or a truncated file, raises InvalidInputError."""
    with pytest.raises(errors.InvalidInputError, match="input: can't send"):
        client.extract("residual", Image.new("F", (16, 16)), "layer1")
    with pytest.raises(errors.InvalidInputError, match="mode I, whose 32-bit numbers have no"):
        client.extract("residual", Image.new("I", (16, 16)), "layer1")
    with (
        Image.open(io.BytesIO(PHOTO.read_bytes()[:-size])) as image,
        pytest.raises(errors.InvalidInputError, match="input: can't send"),
    ):
        client.extract("residual", image, "layer1")


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_and_its_file_are_the_same(client, orientation: int, tmp_path: Path) -> None:
    """A PIL image keeps the EXIF orientation of its file, so the server turns both upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)

    with Image.open(path) as image:
        of_image = client.extract("residual", image, "conv1:input")
    of_file = client.extract("residual", path, "conv1:input")

    assert np.array_equal(of_image["conv1:input"], of_file["conv1:input"])


def test_an_extractor_that_there_is_not_is_refused(client) -> None:
    """An unknown extractor name raises layertap's error, which lists the known names."""
    with pytest.raises(errors.InvalidInputError, match="extractor: got 'hok', expected one of"):
        client.extract("residual", batch(), "layer1", extractor="hok")


def test_arrays_of_any_layout_and_tensors_are_taken(client) -> None:
    """Strided and big-endian arrays and torch tensors are sent with the right values."""
    x = batch(2)
    expected = client.extract("residual", x, "layer1", extractor="hook")["layer1"]
    channels_last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, 3)), 3, 1)
    for given in (channels_last, x.astype(">f4"), torch.from_numpy(x)):
        got = client.extract("residual", given, "layer1", extractor="hook")["layer1"]
        assert np.array_equal(got, expected)


def test_tensors_that_torch_changes_late_are_sent_as_they_are_seen(client) -> None:
    """Torch negates the imaginary part of a conjugate lazily, only when it is read."""
    x = torch.from_numpy(batch())
    lazy = torch.complex(x, -x).conj().imag
    assert lazy.is_neg()
    got, expected = (
        client.extract("residual", given, "layer1", extractor="hook")["layer1"]
        for given in (lazy, x)
    )
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("kind", ["sparse", "float8", "meta"])
def test_tensors_that_no_array_can_be_made_of_are_refused(client, kind) -> None:
    """A tensor that numpy can't represent raises InvalidInputError."""
    x = torch.zeros(1, *ITEM)
    given = {"sparse": x.to_sparse(), "float8": x.to(torch.float8_e5m2), "meta": x.to("meta")}
    with pytest.raises(errors.InvalidInputError, match="input: can't send a Tensor"):
        client.extract("residual", given[kind], "layer1")


@pytest.mark.parametrize("given", [3, [], [3], ["/no/such/file.jpg"], object()])
def test_what_is_no_input_is_refused_before_it_is_sent(client, given) -> None:
    """What is neither an image nor an array raises InvalidInputError before it is sent."""
    with pytest.raises(errors.InvalidInputError, match="input"):
        client.extract("residual", given, "layer1")


def test_the_servers_exception_comes_back(client) -> None:
    """Each error is raised as the class that the server names."""
    with pytest.raises(errors.ModelNotFoundError, match="'residual'"):
        client.extract("nobody", batch(), "layer1")
    with pytest.raises(errors.LayerNotFoundError, match="layer1"):
        client.extract("residual", batch(), "layer_1")
    with pytest.raises(errors.ExtractorUnsupportedError):
        client.extract("residual", batch(), "layer1.0", extractor="children")


def test_a_deadline_ends_the_call(client) -> None:
    """A call that takes longer than its timeout raises, and the server continues to serve."""
    begun = time.monotonic()
    with pytest.raises(errors.DeadlineExceededError):
        client.extract("sleepy", ONE_SECOND, "conv", timeout=0.2)
    assert time.monotonic() - begun < 30
    assert client.extract("residual", batch(), "layer1", timeout=60)


@pytest.mark.parametrize("seconds", [1e9, 1e12, float("inf")])
def test_a_timeout_without_an_end_is_none(client, seconds) -> None:
    """Calls, streams and their items with an endless timeout are answered."""
    assert client.extract("residual", batch(), "layer1", timeout=seconds)
    assert list(client.extract_many("residual", [batch()], "layer1", item_timeout=seconds))
    with client.stream(timeout=seconds) as stream:
        asked = [StreamRequest("residual", batch(), "layer1", timeout=seconds)]
        [(_, outcome)] = stream.extract(asked)
    assert list(outcome) == ["layer1"]
    client.wait_ready(seconds)


def test_nobody_at_the_address_is_unavailable() -> None:
    """If no server runs at the address, UnavailableError is raised, not a gRPC exception."""
    with Client("127.0.0.1:1", timeout=5) as client, pytest.raises(errors.UnavailableError):
        client.list_models()


def test_wait_ready_waits_for_health(engine) -> None:
    """Waiting ends when the server reports that it is ready, and not earlier."""
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    try:
        with Client(server.address) as client:
            with pytest.raises(errors.UnavailableError):
                client.wait_ready(0.2)
            threading.Timer(0.2, server.ready).start()
            client.wait_ready(60)
    finally:
        server.stop(0)


def test_wait_ready_waits_for_a_server_that_restarts(engine) -> None:
    """If the server stops during ``wait_ready`` and starts again in time, the wait succeeds."""
    old = FeatureServer(engine, ServerOptions(port=0))
    old.start()
    port = int(old.address.rpartition(":")[2])
    with Client(old.address) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_ready, 60)
        time.sleep(0.2)
        old.stop(0)
        time.sleep(0.2)
        assert not waiting.done()
        new = FeatureServer(engine, ServerOptions(port=port))
        new.start()
        new.ready()
        try:
            waiting.result(30)
        finally:
            new.stop(0)


@pytest.mark.long
def test_a_server_that_was_away_is_found_soon(engine) -> None:
    """After an outage, calls succeed within about a second, and ``wait_ready`` is right."""
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    port = int(server.address.rpartition(":")[2])
    with Client(server.address, timeout=5) as client, Client(server.address) as waiting:
        client.list_models()
        server.stop(0)
        ends = time.monotonic() + 6  # gRPC's own pauses are above 3 seconds by then.
        while time.monotonic() < ends:
            with pytest.raises(errors.UnavailableError):
                client.list_models()
            time.sleep(0.1)
        with pytest.raises(errors.UnavailableError, match="within 0.1 seconds: it never answered"):
            waiting.wait_ready(0.1)
        server = FeatureServer(engine, ServerOptions(port=port))
        server.start()
        server.ready()
        begun = time.monotonic()
        try:
            waiting.wait_ready(5)
            client.list_models()
            assert time.monotonic() - begun < 2.5
        finally:
            server.stop(0)


def test_a_closed_client_is_unavailable(engine) -> None:
    """Every call of a closed client raises a layertap error."""
    with running_server(engine) as address:
        client = Client(address)
        client.close()
        for call in (
            lambda: client.extract("residual", batch(), "layer1"),
            client.list_models,
            client.health,
            client.stream,
            lambda: list(client.extract_many("residual", [batch()], "layer1")),
            lambda: client.wait_ready(1),
        ):
            with pytest.raises(errors.UnavailableError, match="closed"):
                call()


def test_waiting_ends_when_the_client_is_closed(engine) -> None:
    """If another thread closes the client, ``wait_ready`` raises."""
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    client = Client(server.address)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.wait_ready, 60)
            time.sleep(0.2)
            client.close()
            with pytest.raises(errors.UnavailableError, match="closed"):
                waiting.result(30)
    finally:
        server.stop(0)


def test_large_replies_pass(client) -> None:
    """A reply over gRPC's default limit of 4 MB arrives."""
    features = client.extract("residual", np.zeros((600, *ITEM), np.float32), ["conv1", "layer1"])
    assert sum(value.nbytes for value in features.values()) > 2_400_000
    big = np.zeros((16, 3, 256, 256), np.float32)
    assert client.extract("residual", big, "conv1")["conv1"].nbytes > 8_000_000


def test_the_client_does_not_import_torch() -> None:
    """Importing the client or the package does not import torch."""
    code = "import layertap, layertap.client, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert layertap.__version__


def test_clients_are_shared_between_threads(client) -> None:
    """Eight threads that share a client each get the answer to their own request."""
    wrong: list[int] = []

    def ask(seed: int) -> None:
        x = np.random.default_rng(seed).random((1, *ITEM), dtype=np.float32)
        answers = [
            client.extract("residual", x, "layer1", extractor="hook")["layer1"] for _ in range(6)
        ]
        wrong.extend(seed for answer in answers if not np.array_equal(answer, answers[0]))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_channel_error_without_our_metadata_is_still_ours(engine) -> None:
    """A status from gRPC itself, such as for a too large request, is raised as a layertap error."""
    with (
        running_server(engine) as address,
        Client(address) as client,
        pytest.raises(errors.LayertapError),
    ):
        client.extract("residual", np.zeros((30_000, *ITEM), np.float32), "layer1")


def test_a_call_that_the_other_side_ends_is_unavailable() -> None:
    """gRPC resets calls to a stopping server with CANCELLED, although nobody cancelled them."""

    def end(message: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.CANCELLED, "RST_STREAM with error code 8")

    handlers = {"ListModels": grpc.unary_unary_rpc_method_handler(end)}
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("layertap.v1.FeatureService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with (
            Client(f"127.0.0.1:{port}") as client,
            pytest.raises(errors.UnavailableError, match="the server ended the call: RST_STREAM"),
        ):
            client.list_models()
        server.stop(None).wait()


def test_a_variant_is_named_in_each_kind_of_call(client) -> None:
    """A call, the items of a stream, and a copy of the reply that was pickled."""
    named = {"extractor": "torchscript", "variant": "channels_last"}
    once = client.extract("residual", batch(2), "layer1", **named)
    (streamed,) = client.extract_many("residual", [batch(2)], "layer1", **named)
    usual = client.extract("residual", batch(2), "layer1", extractor="torchscript")
    assert (once.variant, streamed.variant, usual.variant) == ("channels_last", "channels_last", "")
    assert pickle.loads(pickle.dumps(once)).variant == "channels_last"
    for each in (streamed, usual):
        np.testing.assert_allclose(each["layer1"], once["layer1"], 1e-4, 1e-5)
    with pytest.raises(errors.InvalidInputError, match="with AUTO, which chooses by itself"):
        client.extract("residual", batch(2), "layer1", variant="channels_last")
