"""The counters change with the calls, over a real channel and on the page."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kept import kept
from layertap import Client, LayertapError
from layertap.app.http_page import HttpPage
from layertap.app.metrics import Metrics
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.errors import ModelRunError, UnavailableError
from layertap.malloc import retained_bytes
from layertap.models import ModelSpec
from serving import http_page
from tinynets import ITEM

BATCH = np.zeros((2, *ITEM), np.float32)
HOSTILE = "x" * 1000

Sample = tuple[str, tuple[tuple[str, str], ...]]


class Served:
    """A server with a client and a metrics page."""

    def __init__(self, client: Client, channel: grpc.Channel, page: HttpPage) -> None:
        self.client = client
        self.extract_raw = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        self.page = page

    def samples(self) -> dict[Sample, float]:
        """Read the page."""
        with urllib.request.urlopen(self.page.url) as reply:  # noqa: S310 - our own page
            text = reply.read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Read one number; 0 if it has not been counted yet."""
        key = (f"layertap_inference_{name}", tuple(sorted(labels.items())))
        return self.samples().get(key, 0.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("tinynets:raises", item_shape=ITEM))
    yield engine
    engine.close()


@pytest.fixture
def served(engine: Engine) -> Iterator[Served]:
    metrics = Metrics(engine)
    server = FeatureServer(engine, ServerOptions(port=0), metrics)
    server.start()
    server.ready()
    page = http_page(metrics)
    with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
        yield Served(client, channel, page)
    page.close()
    server.stop(1)


def test_success_is_counted(served: Served) -> None:
    """An answer counts once, with its bytes and four durations, under its model's name."""
    for _ in range(3):
        served.client.extract("residual", BATCH, "layer1")
    assert served.value("request_success_total", model="residual") == 3
    assert served.value("exec_total", model="residual") == 3
    floats = 3 * 2 * 8 * 8 * 8 * 4
    assert floats < served.value("reply_bytes_total", model="residual") < floats + 3 * 200
    for part in ("request", "prepare", "queue", "compute"):
        assert served.value(f"{part}_duration_seconds_count", model="residual") == 3
    parts = [
        served.value(f"{part}_duration_seconds_sum", model="residual")
        for part in ("prepare", "queue", "compute")
    ]
    assert 0 < sum(parts) <= served.value("request_duration_seconds_sum", model="residual") < 60


def test_failure_is_counted_by_status(served: Served) -> None:
    """A refused request counts under its model and its gRPC status, and not as a success."""
    with pytest.raises(LayertapError):
        served.client.extract("residual", BATCH, "layer9")
    with pytest.raises(LayertapError):
        served.client.extract("residual", BATCH[:, :1], "layer1")
    assert served.value("request_failure_total", model="residual", reason="NOT_FOUND") == 1
    assert served.value("request_failure_total", model="residual", reason="INVALID_ARGUMENT") == 1
    assert served.value("request_success_total", model="residual") == 0


def test_model_that_breaks_is_an_internal_failure(served: Served) -> None:
    """A model that raises counts as INTERNAL."""
    with pytest.raises(ModelRunError):
        served.client.extract("raises", BATCH + 1e6, "head")
    assert served.value("request_failure_total", model="raises", reason="INTERNAL") == 1


def test_hostile_names_make_no_labels(served: Served) -> None:
    """Models that are not served, and malformed requests, count without a model."""
    with pytest.raises(LayertapError):
        served.client.extract(HOSTILE, BATCH, "layer1")
    with pytest.raises(grpc.RpcError):
        served.extract_raw(b"\xff\xff\xff")
    assert served.value("request_failure_total", model="", reason="NOT_FOUND") == 1
    assert served.value("request_failure_total", model="", reason="INVALID_ARGUMENT") == 1
    assert HOSTILE not in str(served.samples())


def test_pending_is_shown(served: Served) -> None:
    """The page shows how many requests wait for the compute thread or run on it."""
    assert served.value("pending_request_count") == 0


@pytest.mark.skipif(retained_bytes() is None, reason="needs glibc's malloc")
def test_memory_is_shown(served: Served) -> None:
    """The page shows malloc's free memory, which is a part of the process's memory."""
    samples = served.samples()
    retained = samples["layertap_memory_retained_bytes", ()]
    assert 0 <= retained < samples["process_resident_memory_bytes", ()]


def test_two_servers_count_apart(served: Served) -> None:
    """Metrics have their own registry: another server's begin at zero."""
    served.client.extract("residual", BATCH, "layer1")
    other = http_page(Metrics())
    with urllib.request.urlopen(other.url) as reply:  # noqa: S310 - our own page
        assert b"residual" not in reply.read()
    other.close()


def test_closed_page_frees_its_port(served: Served) -> None:
    """A port in use is an error with a remedy, and closing the page frees it."""
    page = http_page(Metrics())
    port = int(page.url.split(":")[2].split("/")[0])
    with pytest.raises(UnavailableError, match="--metrics-port"):
        http_page(Metrics(), port)
    page.close()
    http_page(Metrics(), port).close()


def test_shows_the_memory_of_the_models_that_serve() -> None:
    """Each served model has the bytes of its parameters and buffers, until it is unloaded."""
    engine = Engine(plan_cache=kept())
    page = http_page(Metrics(engine))
    engine.load(ModelSpec("tinynets:heavy", item_shape=(3, 16, 16)))
    weights = 4 * (768 * 4096 + 4096 + 4096 * 8 + 8)
    line = re.compile(r'(?m)^layertap_model_memory_bytes\{device="cpu",model="heavy"\} (\S+)$')

    def shown() -> list[float]:
        with urllib.request.urlopen(page.url) as reply:  # noqa: S310 - our own page
            return [float(value) for value in line.findall(reply.read().decode())]

    assert shown() == [weights]
    engine.unload("heavy")
    assert shown() == []
    page.close()
    engine.close()
