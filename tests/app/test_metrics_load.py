"""The page agrees with what clients observed, shows the server's state, and can be parsed."""

from __future__ import annotations

import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

import layertap
from kept import kept
from layertap import Client, LayertapError
from layertap.app.http_page import HttpPage
from layertap.app.metrics import Metrics
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.services.error_codes import code_of
from serving import http_page
from tinynets import ITEM

BATCH = np.zeros((2, *ITEM), np.float32)
# What a client may send: the model, the layer, the input.
CALLS = [
    ("residual", "layer1", BATCH),
    ("residual", "conv1", BATCH[:1]),
    ("residual", "layer9", BATCH),
    ("residual", "layer1", BATCH[:, :1]),
    ("raises", "head", BATCH + 1e6),
    ("nobody", "layer1", BATCH),
]
CLIENTS = 6
ROUNDS = 5

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("tinynets:raises", item_shape=ITEM))
    yield engine
    engine.close()


def read(page: HttpPage, accept: str = "text/plain") -> str:
    request = urllib.request.Request(page.url, headers={"Accept": accept})  # noqa: S310 - our own page
    with urllib.request.urlopen(request) as reply:  # noqa: S310 - our own page
        return reply.read().decode()


def samples(page: HttpPage) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(read(page))
        for sample in family.samples
    }


def labelled(found: Samples, name: str) -> dict[frozenset[tuple[str, str]], float]:
    return {labels: value for (each, labels), value in found.items() if each == name}


def load(address: str, seed: int) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Make every kind of call in random order; count the outcomes and the bytes of replies."""
    outcomes: Counter[tuple[str, str]] = Counter()
    sizes: Counter[str] = Counter()
    order = np.random.default_rng(seed).permutation(len(CALLS) * ROUNDS) % len(CALLS)
    with Client(address) as client:
        for index in order:
            model, layer, batch = CALLS[index]
            try:
                # A trace would drop the statement that raises.
                features = client.extract(model, batch, layer, extractor="hook")
            except LayertapError as error:
                served = model if model != "nobody" else ""
                outcomes[served, code_of(error).name] += 1
            else:
                outcomes[model, "OK"] += 1
                sizes[model] += features[layer].nbytes
    return outcomes, sizes


def test_counters_agree_with_the_clients(engine: Engine) -> None:
    """After mixed calls of several clients, every counter is the sum of what they observed."""
    metrics = Metrics(engine)
    server = FeatureServer(engine, ServerOptions(port=0), metrics)
    server.start()
    page = http_page(metrics)
    with ThreadPoolExecutor(CLIENTS) as pool:
        results = list(pool.map(lambda seed: load(server.address, seed), range(CLIENTS)))
    found = samples(page)
    page.close()
    server.stop(1)
    seen = sum((outcomes for outcomes, _ in results), Counter())
    assert sum(seen.values()) == CLIENTS * ROUNDS * len(CALLS)
    assert len(seen) == 5, "each kind of failure, and success"
    successes = {
        dict(labels)["model"]: value
        for labels, value in labelled(found, "layertap_inference_request_success_total").items()
    }
    assert successes == {"residual": seen["residual", "OK"]}
    failures = {
        (dict(labels)["model"], dict(labels)["reason"]): value
        for labels, value in labelled(found, "layertap_inference_request_failure_total").items()
    }
    assert failures == {key: count for key, count in seen.items() if key[1] != "OK"}
    residual = frozenset({("model", "residual")})
    for part in ("request", "prepare", "queue", "compute"):
        count = found[f"layertap_inference_{part}_duration_seconds_count", residual]
        assert count == seen["residual", "OK"]
    tensors = sum(sizes["residual"] for _, sizes in results)
    assert tensors < found["layertap_inference_reply_bytes_total", residual] < 1.2 * tensors


def test_the_page_parses_in_both_formats(engine: Engine) -> None:
    """Prometheus' text format and OpenMetrics are both valid, and contain the same names."""
    metrics = Metrics(engine)
    metrics.show_waiting(lambda: 0)
    page = http_page(metrics)
    text = {family.name for family in parse_text(read(page))}
    openmetrics_text = read(page, "application/openmetrics-text; version=1.0.0")
    page.close()
    assert openmetrics_text.endswith("# EOF\n")
    families = {family.name for family in parse_openmetrics(openmetrics_text)}
    assert {name for name in text if name.startswith("layertap_")} <= families


def test_versions_are_shown(engine: Engine) -> None:
    """The page shows the versions of the running packages."""
    page = http_page(Metrics(engine))
    ((labels, value),) = labelled(samples(page), "layertap_build_info").items()
    page.close()
    assert value == 1
    assert dict(labels)["version"] == layertap.__version__
    assert set(dict(labels)) == {"version", "torch", "grpcio", "python"}


def test_models_are_ready_once_loaded() -> None:
    """A model is 0 once it is expected and 1 once it is loaded; when unloaded it is not shown."""
    engine = Engine(plan_cache=kept())
    page = http_page(Metrics(engine))
    ready = frozenset({("model", "residual")})
    try:
        engine.expect(["residual"])
        assert labelled(samples(page), "layertap_model_ready") == {ready: 0}
        engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
        assert labelled(samples(page), "layertap_model_ready") == {ready: 1}
        engine.unload("residual")
        assert labelled(samples(page), "layertap_model_ready") == {}
    finally:
        page.close()
        engine.close()


def test_calls_beyond_the_workers_are_shown(engine: Engine) -> None:
    """Calls that have arrived and wait for a worker thread are counted separately."""
    metrics = Metrics(engine)
    server = FeatureServer(engine, ServerOptions(port=0), metrics)
    server.start()
    workers = server._workers.count
    busy, release = threading.Barrier(workers + 1), threading.Event()

    def hold() -> None:
        busy.wait(60)
        release.wait(60)

    for _ in range(workers):
        server._workers.submit(hold)
    busy.wait(60)
    with grpc.insecure_channel(server.address) as channel:
        method = channel.unary_unary("/layertap.v1.FeatureService/ListModels")
        calls = [method.future(b"") for _ in range(3)]
        arrived = threading.Event()
        for _ in range(600):
            if server.waiting == 3:
                break
            arrived.wait(0.05)
        assert server.waiting == 3
        release.set()
        for call in calls:
            call.result(60)
    assert server.waiting == 0
    server.stop(1)
