"""Log records are text or JSON, and contain the id of their request."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kept import kept
from layertap import Client
from layertap.app.access_log import AccessLog
from layertap.app.logs import LogNarrator, configure_logs
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2
from layertap.wire.messages import encode_request
from processes import ENVIRONMENT, layertap, serving
from tinynets import ITEM

BATCH = np.zeros((2, *ITEM), np.float32)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Restore the process's logging after the test."""
    root, loggers = logging.getLogger(), ("layertap", "layertap.serve")
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in loggers}
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)
    for name, former in levels.items():
        logging.getLogger(name).setLevel(former)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("tinynets:raises", item_shape=ITEM))
    yield engine
    engine.close()


def extract(
    engine: Engine, request_id: str, model: str, layer: str, batch: np.ndarray, **how: Any
) -> str:
    """Make one call of a real server with an access log; return the status's name."""
    server = FeatureServer(engine, ServerOptions(port=0), AccessLog())
    server.start()
    layers = [feature_service_pb2.LayerSelection(layer=layer)]
    request = feature_service_pb2.ExtractRequest(model=model, layers=layers, **how)
    try:
        with grpc.insecure_channel(server.address) as channel:
            method = channel.unary_unary("/layertap.v1.FeatureService/Extract")
            method(encode_request(request, [("", batch)]), metadata=(("x-request-id", request_id),))
    except grpc.RpcError as error:
        return error.code().name
    finally:
        server.stop(1)
    return "OK"


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_records_are_objects() -> None:
    """A record is one line of JSON, including its traceback."""
    stream = io.StringIO()
    configure_logs("json", "warning", stream)
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        logging.getLogger("layertap.test").exception("it %s", "broke\n")
    (record,) = records(stream)
    assert record["time"].endswith("Z")
    assert (record["level"], record["logger"], record["message"]) == (
        *("error", "layertap.test"),
        "it broke\n",
    )
    assert record["exception"].endswith("RuntimeError: two\nlines")
    assert "request_id" not in record


def test_human_records_stay_on_their_line() -> None:
    """A message can neither start a new line nor send control characters to the terminal."""
    stream = io.StringIO()
    configure_logs("human", "warning", stream)
    logging.getLogger("layertap.test").warning("a\n2026 ERROR forged \x1b[31m\u2028 é")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r"WARNING layertap.test: a\n2026 ERROR forged \x1b[31m\u2028 é")


def test_the_level_is_for_layertap_alone() -> None:
    """INFO applies to layertap's loggers, and leaves other libraries at WARNING."""
    stream = io.StringIO()
    configure_logs("json", "info", stream)
    logging.getLogger("layertap.test").info("ours")
    logging.getLogger("another").info("theirs")
    assert [record["message"] for record in records(stream)] == ["ours"]


def test_access_log_of_a_variant(engine: Engine) -> None:
    """The record names it; without one there is no such field."""
    stream = io.StringIO()
    configure_logs("json", "info", stream)
    how = {"extractor": "EXTRACTOR_TORCHSCRIPT"}
    for variant in ("channels_last", ""):
        assert extract(engine, "r", "residual", "conv1", BATCH, **how, variant=variant) == "OK"
    named, usual = [each for each in records(stream) if each["logger"] == "layertap.access"]
    assert (named["extractor"], named["variant"]) == ("torchscript", "channels_last")
    assert "variant" not in usual


def test_access_log_of_an_answer(engine: Engine) -> None:
    """At INFO an extraction is one record with its request id, size and durations."""
    stream = io.StringIO()
    configure_logs("json", "info", stream)
    assert extract(engine, "req-1", "residual", "layer1", BATCH) == "OK"
    (record,) = [each for each in records(stream) if each["logger"] == "layertap.access"]
    assert record["request_id"] == "req-1"
    assert record["level"] == "info"
    assert (record["model"], record["extractor"], record["status"]) == ("residual", "hook", "OK")
    assert record["peer"].startswith("ipv4:127.0.0.1:")
    assert record["bytes"] > 2 * 8 * 8 * 8 * 4
    parts = record["prepare_ms"] + record["queue_ms"] + record["compute_ms"]
    assert 0 < parts <= record["total_ms"] + 0.002


def test_access_log_of_a_refusal(engine: Engine) -> None:
    """A refused extraction is one record with its status, without any text from the caller."""
    stream = io.StringIO()
    configure_logs("human", "info", stream)
    assert extract(engine, "req-2", "no\nsuch", "layer1", BATCH) == "NOT_FOUND"
    (line,) = [line for line in stream.getvalue().splitlines() if "layertap.access" in line]
    assert re.search(r"model= status=NOT_FOUND peer=ipv4:127\.0\.0\.1:\d+ total_ms=", line)
    assert line.endswith("[request req-2]")
    assert "such" not in line


def test_compute_thread_tells_the_request(engine: Engine) -> None:
    """What the compute thread logs about a failed model has the request's id."""
    stream = io.StringIO()
    configure_logs("json", "warning", stream)
    assert extract(engine, "req-3", "raises", "head", BATCH + 1e6) == "INTERNAL"
    (record,) = records(stream)
    assert record["logger"] == "layertap.engine.work"
    assert record["request_id"] == "req-3"
    assert "Traceback" in record["exception"]


def test_nothing_is_logged_of_answers_by_default(engine: Engine) -> None:
    """At WARNING an answered extraction logs nothing, and the access log is omitted."""
    stream = io.StringIO()
    configure_logs("json", "warning", stream)
    assert not AccessLog.wanted()
    assert extract(engine, "req-4", "residual", "layer1", BATCH) == "OK"
    assert stream.getvalue() == ""


def test_narration_has_levels() -> None:
    """Progress is logged at any level, errors and warnings with their own level."""
    stream = io.StringIO()
    configure_logs("json", "error", stream)
    LogNarrator().say("serving a on b")
    LogNarrator().say("no", logging.ERROR)
    LogNarrator().say("warning: of an approaching storm")
    LogNarrator().say("open", logging.WARNING)
    told = [(record["level"], record["message"]) for record in records(stream)]
    assert told == [
        ("info", "serving a on b"),
        ("error", "no"),
        ("info", "warning: of an approaching storm"),
        ("warning", "open"),
    ]


def test_serve_logs_json_only() -> None:
    """``layertap serve --log-format json`` writes only JSON lines to stderr."""
    with serving("tinynets:residual", "--item-shape", "3,8,8", "--log-format", "json") as server:
        server.line(r'"message": "serving residual on ')
        server.process.terminate()
        assert server.ended() == 0
        entries = [json.loads(line) for line in server.lines]
    assert entries[-1]["message"] == "stopped serving"


@pytest.mark.long
def test_everything_that_a_server_writes_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output of gRPC's core and of models, warnings and uncaught exceptions become records."""
    monkeypatch.setitem(ENVIRONMENT, "GRPC_VERBOSITY", "INFO")
    monkeypatch.setitem(ENVIRONMENT, "GRPC_TRACE", "server_channel")
    args = ("noisynets:noisy", "--item-shape", "3,8,8", "--log-format", "json")
    with serving(*args, fresh=True) as server:
        server.line(r'"message": "serving noisy on ')
        server.process.terminate()
        assert server.ended() == 0
        entries = [json.loads(line) for line in server.lines]
    found = {(each["logger"], each["level"], each["message"].split("\n")[0]) for each in entries}
    assert ("output", "warning", "native text é") in found
    assert ("output", "warning", "printed text") in found
    core = [each["level"] for each in entries if "] gRPC Tracers: " in each["message"]]
    assert core == ["info"]
    (warning,) = [each for each in entries if each["logger"] == "py.warnings"]
    assert "UserWarning: a model's warning" in warning["message"]
    uncaught = {each["message"]: each for each in entries if each["logger"] == "layertap.uncaught"}
    in_thread = uncaught["uncaught exception in noisy-thread: ValueError('in a thread')"]
    assert "Traceback" in in_thread["exception"]
    assert any("ValueError('in a destructor')" in message for message in uncaught)


def test_the_last_words_of_a_crash_are_json() -> None:
    """What native code writes just before it aborts the process still becomes a record."""
    args = ["noisynets:aborts", "--item-shape", "3,8,8", "--log-format", "json"]
    with serving(*args) as server:
        assert server.ended() < 0
        entries = [json.loads(line) for line in server.lines]
    assert entries[-1]["message"] == "terminate called after throwing an instance of 'noisy'"


def test_a_wrong_configuration_is_told_as_json(tmp_path: Path) -> None:
    """With --log-format json, an error that prevents the start is a record too."""
    config = tmp_path / "layertap.toml"
    config.write_text("[server]\nport = 'x'\n", "utf-8")
    done = layertap("serve", "--config", str(config), "--log-format", "json")
    assert done.returncode == 1
    (entry,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert entry["level"] == "error"
    assert "server.port: got 'x'" in entry["message"]


def test_logged_bytes_include_shared_memory() -> None:
    """A reply through shared memory is logged with all of its bytes."""
    args = ("tinynets:residual", "--item-shape", "3,64,64", "--log-format", "json")
    with serving(*args, "--log-level", "info") as server:
        address = server.line(r'"message": "serving residual on ([^"]+)"')[1]
        batch = np.zeros((8, 3, 64, 64), np.float32)
        sizes = []
        for shared in (False, True):
            with Client(address, shared_memory=shared) as client:
                values = client.extract("residual", batch, "layer1")["layer1"]
            line = server.line(r'"logger": "layertap.access".*', len(sizes) + 1)
            sizes.append(json.loads("{" + line[0])["bytes"])
    assert min(sizes) >= values.nbytes
    assert abs(sizes[0] - sizes[1]) < 1000
