"""Ray Serve: calls through its gRPC proxy end as those to the replica's own gRPC port do.

Run it with ``make test-ray``. What happens when replicas die, change or grow in number: see
check_ray_serve.py.
"""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from ray import serve

import layertap
from layertap import Client, errors
from layertap.engine import Engine
from layertap.errors import ConfigError
from layertap.grpc_health import health_pb2
from layertap.ray.serve import app
from layertap.ray.serve.proxy import _SERVICES, FEATURES, HEALTH, TIME_LEFT_KEY
from layertap.services.feature_service import FeatureService
from layertap.services.infer.statistics import Statistics
from layertap.services.methods import StreamMethod
from layertap.services.open_streams import OpenStreams
from layertap.services.stream_threads import StreamThreads
from layertap.v1 import feature_service_pb2 as pb
from ports import free_port
from rays import local_cluster, serving
from relay import Counting
from streams import eventually
from tinynets import ITEM

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

NET = "residual"
TOKEN = "a-token-of-some-length"
MODELS = [
    {"source": "tinynets:residual", "item_shape": list(ITEM)},
    {"source": "slownets:sleepy", "item_shape": [3, 4, 4]},
]


class Ways(NamedTuple):
    """The addresses at which the same replica is reached.

    Attributes:
        proxy: Through Ray's proxy.
        direct: At its own port.
        metrics: The page of the replica's metrics.
    """

    proxy: str
    direct: str
    metrics: str


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    """Two applications: the default one with a port of its own, and one that wants tokens."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(TOKEN)
    port, page = free_port(), free_port()
    own = {"plan_cache": "off", "keep_memory": False}
    direct = {**own, "host": "127.0.0.1", "port": port, "metrics_port": page}
    limits = {"streams": 2, "request_mib": 16, "batch": 2000}
    deployment = {"num_replicas": 1}
    with local_cluster(), serving() as proxy:
        for name, args in {
            "open": {"models": MODELS, "server": direct, "limits": limits, "direct": True},
            "guarded": {
                "models": MODELS[:1],
                "server": {**own, "extract_tokens_file": str(tokens)},
            },
        }.items():
            serve.run(app({**args, "deployment": deployment}), name=name, route_prefix=f"/{name}")
        yield Ways(proxy, f"127.0.0.1:{port}", f"http://127.0.0.1:{page}/metrics")


@pytest.fixture(scope="module")
def client(ways: Ways) -> Iterator[Client]:
    """A client of the default application, through the proxy."""
    with Client(ways.proxy, metadata={"application": "open"}) as client:
        yield client


def batch(items: int = 1) -> np.ndarray:
    return np.random.default_rng(items).random((items, *ITEM), np.float32)


def sleeping(seconds: float) -> np.ndarray:
    return np.full((1, 3, 4, 4), 1000 * seconds, np.float32)


def test_values(client: Client) -> None:
    """Unary calls and streams give the values of the model in this process, bit for bit."""
    layers = ["layer1", "avgpool:dtype=float16=pooled"]
    inputs = [batch(size) for size in (1, 2, 3, 5)]
    with layertap.load("tinynets:residual", item_shape=ITEM, device="cpu", threads=1) as model:
        expected = [model.extract(each, layers, extractor="hook").numpy() for each in inputs]
    unary = [client.extract(NET, each, layers, extractor="hook") for each in inputs]
    streamed = list(client.extract_many(NET, inputs, layers, extractor="hook"))
    for found in (unary, streamed):
        for features, want in zip(found, expected, strict=True):
            for name in ("layer1", "pooled"):
                np.testing.assert_array_equal(features[name], want[name])
    assert [each.name for each in client.list_models()] == [NET, "sleepy"]
    assert "layer1" in {each.name for each in client.describe_model(NET).layers}


def test_messages_of_many_megabytes(client: Client) -> None:
    """Requests and replies above gRPC's and Ray's default of 4 MB pass; above ours they don't."""
    x = batch(2000)
    features = client.extract(NET, x, "conv1", extractor="hook")
    assert (x.nbytes, features["conv1"].nbytes) == (2000 * 3 * 16 * 16 * 4, 2000 * 8 * 8 * 8 * 4)
    with pytest.raises(errors.InvalidInputError, match=r"got \d+ bytes, expected at most 16777216"):
        client.extract("sleepy", np.zeros((90_000, 3, 4, 4), np.float32), "conv")


class Outcome(NamedTuple):
    """How a call ended, as a client without our code sees it."""

    code: str
    text: str
    metadata: dict[str, str]
    reply: bytes


def asked(address: str, method: str, message: bytes, **metadata: str) -> Outcome:
    """Make a unary call with bytes."""
    sent = {"application": "open", "x-request-id": "the-id", **metadata}
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(method)
        try:
            reply, done = call.with_call(message, metadata=tuple(sent.items()), timeout=60)
        except grpc.RpcError as error:
            reply, done = b"", error
    trailing = {key: str(value) for key, value in done.trailing_metadata() or ()}
    trailing.pop("request_id", None)  # Ray's own.
    if "grpc-retry-pushback-ms" in trailing:
        trailing["grpc-retry-pushback-ms"] = "random"
    return Outcome(done.code().name, done.details(), trailing, reply)


FEATURE = f"/{FEATURES}/"
CALLS = {
    "not a message": (f"{FEATURE}Extract", b"\xff\xff"),
    "no model": (f"{FEATURE}Extract", pb.ExtractRequest(model="nope").SerializeToString()),
    "no input": (f"{FEATURE}Extract", pb.ExtractRequest(model=NET).SerializeToString()),
    "no such model": (
        f"{FEATURE}DescribeModel",
        pb.DescribeModelRequest(model="nope").SerializeToString(),
    ),
    "models": (f"{FEATURE}ListModels", b""),
    "a model": (f"{FEATURE}DescribeModel", pb.DescribeModelRequest(model=NET).SerializeToString()),
    "health": (f"/{HEALTH}/Check", b""),
    "health of a model": (
        f"/{HEALTH}/Check",
        health_pb2.HealthCheckRequest(service=NET).SerializeToString(),
    ),
    "health of nothing": (
        f"/{HEALTH}/Check",
        health_pb2.HealthCheckRequest(service="nope").SerializeToString(),
    ),
}

GOOD = ("models", "a model", "health", "health of a model")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_ends_as_without_a_proxy(ways: Ways, name: str) -> None:
    """Status, text, trailing metadata and reply of good and bad calls are the same both ways."""
    method, message = CALLS[name]
    through, direct = asked(ways.proxy, method, message), asked(ways.direct, method, message)
    if HEALTH in method:  # Health has neither our error names nor a request's id without a proxy.
        through, direct = through._replace(metadata={}), direct._replace(metadata={})
    assert through == direct
    assert (name in GOOD) is (through.code == "OK")


def test_unknown_compression_and_method(ways: Ways) -> None:
    """A compression that doesn't exist, and a method that doesn't."""
    method = f"{FEATURE}ListModels"
    through, direct = (
        asked(address, method, b"", **{"layertap-reply-compression": "zip"})
        for address in (ways.proxy, ways.direct)
    )
    assert through == direct
    assert through.code == "INVALID_ARGUMENT"
    assert asked(ways.proxy, f"{FEATURE}Nothing", b"").code == "UNIMPLEMENTED"


def test_compressed_replies(ways: Ways) -> None:
    """Replies are compressed on request, in streams too, and have the same values."""
    # All items are equal, and so are many of their values.
    x = np.zeros((64, *ITEM), np.float32)
    relay = Counting(ways.proxy)
    given = {"metadata": {"application": "open"}, "shared_memory": False}
    with Client(relay.address, reply_compression="gzip", **given) as client:
        want = client.extract(NET, x, "layer1", extractor="hook")["layer1"].copy()
        assert relay.received < want.nbytes / 4
        for each in client.extract_many(NET, [x] * 3, "layer1", extractor="hook"):
            np.testing.assert_array_equal(each["layer1"], want)
        assert relay.received < want.nbytes
    relay.close()
    with Client(ways.proxy, **given) as client:
        plain = client.extract(NET, x, "layer1", extractor="hook")["layer1"]
        np.testing.assert_array_equal(plain, want)


def test_errors_in_streams(client: Client) -> None:
    """A bad item is that item's error, and the others are answered."""
    inputs = [batch(), np.zeros((1, 2), np.float32), batch()]
    found = list(client.extract_many(NET, inputs, "fc", return_errors=True))
    assert [type(each).__name__ for each in found] == ["Features", "InvalidInputError", "Features"]


def test_a_stream_too_many(ways: Ways, client: Client) -> None:
    """It ends with the error that it has without a proxy, and says when to try again."""
    long = [
        threading.Thread(target=list, args=(client.extract_many("sleepy", [sleeping(2)], "conv"),))
        for _ in range(2)
    ]
    for each in long:
        each.start()
    eventually(lambda: waiting(ways) == 2)
    with pytest.raises(errors.OverloadedError, match="2 streams are open, the most") as refused:
        list(client.extract_many(NET, [batch()], "fc"))
    assert refused.value.retry_after is not None
    for each in long:
        each.join()
    assert len(list(client.extract_many(NET, [batch()], "fc"))) == 1


def test_tokens_and_applications(ways: Ways) -> None:
    """The metadata names the application; a token reaches it, and one that is wrong is refused."""
    with Client(ways.proxy, metadata={"application": "guarded"}) as client:
        with pytest.raises(errors.UnauthenticatedError, match="a valid token is needed"):
            client.extract(NET, batch(), "fc")
        with pytest.raises(errors.UnauthenticatedError):
            list(client.extract_many(NET, [batch()], "fc"))
        client.wait_ready(10)
    with Client(ways.proxy, metadata={"application": "guarded"}, token=TOKEN) as client:
        assert client.extract(NET, batch(), "fc")["fc"].shape == (1, 5)
        assert [each["fc"].shape for each in client.extract_many(NET, [batch()], "fc")] == [(1, 5)]
    with Client(ways.proxy, metadata={"application": "nothing"}) as client:
        with pytest.raises(errors.NotFoundError, match="Application 'nothing' not found"):
            client.extract(NET, batch(), "fc")
        with pytest.raises(errors.UnavailableError, match="Application 'nothing' not found"):
            client.wait_ready(0.5)


def counted(ways: Ways, name: str, *labels: str) -> float:
    """Return the sum of a metric's values with one of the labels, or of all without labels."""
    with urllib.request.urlopen(ways.metrics) as page:  # noqa: S310 - our own
        text = page.read().decode()
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(name) and (not labels or any(label in line for label in labels))
    )


def dropped(ways: Ways) -> float:
    """Return how many requests nobody waited for any more."""
    name = "layertap_inference_request_failure_total"
    return counted(ways, name, '"CANCELLED"', '"DEADLINE_EXCEEDED"')


def waiting(ways: Ways) -> float:
    """Return how many requests wait for a pass, or are in one."""
    return counted(ways, "layertap_inference_pending_request_count")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("how", ["its deadline passes", "its client leaves"])
def test_nobody_waits_any_more(ways: Ways, client: Client, how: str, streamed: bool) -> None:
    """A request behind a long pass is dropped when its deadline passes or its client leaves."""
    before = dropped(ways)
    with Client(ways.proxy, metadata={"application": "open"}) as other:
        long = threading.Thread(target=other.extract, args=("sleepy", sleeping(3), "conv"))
        long.start()
        eventually(lambda: waiting(ways) == 1)
        if how == "its deadline passes":
            with pytest.raises(errors.DeadlineExceededError):
                ask(client, streamed, timeout=0.5)
        else:
            with Client(ways.proxy, metadata={"application": "open"}) as leaving:
                asking = threading.Thread(target=leave, args=(leaving, streamed))
                asking.start()
                eventually(lambda: waiting(ways) == 2)
            asking.join()
        long.join()
    eventually(lambda: dropped(ways) == before + 1)


def test_the_proxy_hands_on_the_deadline(ways: Ways) -> None:
    """It tells the replica the time that is left, whatever the client says of it."""
    said = {"application": "open", TIME_LEFT_KEY: "0.0"}
    with Client(ways.proxy, metadata=said, timeout=None) as client:
        with pytest.raises(errors.DeadlineExceededError, match="while the request was queued"):
            client.extract(NET, batch(), "fc")
        assert client.extract(NET, batch(), "fc", timeout=60)["fc"].shape == (1, 5)


def ask(client: Client, streamed: bool, timeout: float = 60) -> None:
    """Make a call, or send an item."""
    if streamed:
        next(iter(client.extract_many(NET, [batch()], "fc", item_timeout=timeout)))
    else:
        client.extract(NET, batch(), "fc", timeout=timeout)


def leave(client: Client, streamed: bool) -> None:
    """Ask, while another thread closes the client."""
    with pytest.raises(errors.LayertapError):
        ask(client, streamed)


def test_proxies_have_the_methods_of_the_service() -> None:
    """The proxies' list, which needs no PyTorch, is that of the service."""
    observer = Statistics()
    engine = Engine()
    try:
        service = FeatureService(engine, observer, StreamThreads(OpenStreams(1), observer))
        streams = {name: isinstance(m, StreamMethod) for name, m in service.methods().items()}
    finally:
        engine.close()
    assert _SERVICES[FEATURES] == streams


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({}, "models: got none"),
        ({"model": "resnet18"}, "model: unknown argument; arguments are config, models"),
        ({"models": "resnet18", "direct": "yes"}, "direct: got 'yes', expected true or false"),
        ({"models": [{"sources": "x"}]}, "arguments: .*did you mean 'source'"),
        ({"config": "x.toml", "models": "resnet18"}, "models: got it together with config"),
        ({"config": "/nowhere/x.toml"}, "No such file"),
        ({"models": "resnet18", "deployment": 2}, "deployment: got 2, expected options"),
    ],
)
def test_arguments_that_are_wrong(args: dict[str, Any], match: str) -> None:
    """Wrong arguments are refused when the application is built."""
    with pytest.raises(ConfigError, match=match):
        app(args)


def test_a_file_configures_it(tmp_path: Path) -> None:
    """A ``layertap.toml`` is read when the application is built, and its limits are Ray's."""
    file = tmp_path / "layertap.toml"
    file.write_text('[limits]\npending = 12\n\n[[models]]\nsource = "resnet18"\n')
    deployment = app({"config": str(file)})._bound_deployment
    assert deployment.max_ongoing_requests == 12
    assert deployment.init_args[0].models[0].name == "resnet18"
