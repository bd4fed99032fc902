"""Clients that are pickled, forked or used under gevent; features that are pickled."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from authorities import EXTRACT, Authority, token_file
from kept import kept
from layertap import Client, Features, Tls, errors
from layertap.engine import Engine
from layertap.models import ModelSpec
from processes import ENVIRONMENT
from serving import running_server
from tinynets import ITEM

BATCH = np.random.default_rng(3).random((64, *ITEM), np.float32)

GEVENT = """
import sys
from gevent import monkey
monkey.patch_all()
if sys.argv[2] == "told":
    from grpc.experimental import gevent
    gevent.init_gevent()
import numpy as np
from layertap import Client, LayertapError
try:
    with Client(sys.argv[1], timeout=20, shared_memory=False) as client:
        x = np.zeros((1, 3, 32, 32), np.float32)
        print(len(list(client.extract_many("residual", [x] * 5, "layer1"))))
except LayertapError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server of a small net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    with running_server(engine) as address:
        yield address
    engine.close()


def ask(client: Client) -> np.ndarray:
    return client.extract("residual", BATCH, "layer1", extractor="hook")["layer1"]


FORKS = """
import os
import sys
import traceback

import numpy as np
from layertap import Client, StreamRequest, errors

address, what, shared_memory = sys.argv[1:]
BATCH = np.random.default_rng(3).random((64, 3, 16, 16), np.float32)


def ask(client):
    return client.extract("residual", BATCH, "layer1", extractor="hook")["layer1"]


def in_a_fork(what):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            what()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


with Client(address, timeout=40, shared_memory=shared_memory == "True") as client:
    want = ask(client).copy()
    if what == "client":

        def child():
            np.testing.assert_array_equal(ask(client), want)
            assert len(list(client.extract_many("residual", [BATCH] * 3, "layer1"))) == 3
            client.close()

        in_a_fork(child)
        in_a_fork(client.close)
    else:
        items = [StreamRequest("residual", BATCH, "layer1", extractor="hook")]
        with client.stream() as stream:
            assert len(list(stream.extract(items))) == 1

            def child():
                try:
                    list(stream.extract(items))
                except errors.UnavailableError as error:
                    assert "belongs to the parent process" in str(error)
                else:
                    raise RuntimeError("a child has read its parent's stream")
                stream.close()

            in_a_fork(child)
            [(_, outcome)] = stream.extract(items)
            assert not isinstance(outcome, Exception)
    np.testing.assert_array_equal(ask(client), want)
print("done")
"""
"""A process that forks has a client only; a server and torch in it would be forked as well."""


def forks(address: str, what: str, *, shared_memory: bool) -> None:
    """Run the script FORKS to its end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, address, what, str(shared_memory)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_pickled_client_is_made_again(address: str, shared_memory: bool) -> None:
    """An unpickled client has the same target and options, and its own connection."""
    with Client(
        address, timeout=40, shared_memory=shared_memory, reply_compression="gzip"
    ) as client:
        want = ask(client).copy()
        again = pickle.loads(pickle.dumps(client))
        assert again._arguments == client._arguments
        assert again._targets == (address,)
    with again:
        np.testing.assert_array_equal(ask(again), want)


def test_a_secret_is_neither_pickled_nor_lost(tmp_path: Path) -> None:
    """A client with a token can't be pickled, and the error says how; with a token file it can."""
    with Client(token=EXTRACT) as client:
        with pytest.raises(TypeError, match="token_file") as caught:
            pickle.dumps(client)
        assert EXTRACT not in str(caught.value)
        with pytest.raises(TypeError, match="token_file"):
            copy.copy(client)
    file = token_file(tmp_path / "tokens", EXTRACT)
    mine = Authority(tmp_path / "ca").issue("client")
    tls = Tls(certificate=mine.certificate, key=mine.key)
    with Client(token_file=file, tls=tls) as client:
        pickled = pickle.dumps(client)
    assert EXTRACT.encode() not in pickled
    with pickle.loads(pickled) as again:
        assert again._arguments["token_file"] == file
        assert again._arguments["tls"] == tls
    with pytest.raises(errors.ConfigError, match="one of them"):
        Client(token=EXTRACT, token_file=file)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("shared_memory", [True, False])
def test_features_are_pickled(address: str, shared_memory: bool, protocol: int) -> None:
    """Values, names, types and timings survive pickling, without the server's memory."""
    layers = ["layer1", "conv1:input", "layer1=half"]
    with Client(address, shared_memory=shared_memory) as client:
        features = client.extract("residual", BATCH, layers, extractor="hook")
        pickled = pickle.dumps(features, protocol)
        want = {name: value.copy() for name, value in features.items()}
        extractor, timings = features.extractor, features.timings
        del features
    again = pickle.loads(pickled)
    assert isinstance(again, Features)
    assert list(again) == list(want)
    assert (again.extractor, again.timings) == (extractor, timings)
    for name, value in want.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name], value)
        assert not again[name].flags.writeable
        assert torch.equal(again.torch()[name], torch.from_numpy(value))


def test_features_go_without_a_copy(address: str) -> None:
    """With protocol 5, values are passed as buffers, and unpickled features are views of them."""
    with Client(address, shared_memory=False) as client:
        features = client.extract("residual", BATCH, "layer1", extractor="hook")
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(features, 5, buffer_callback=buffers.append)
    assert len(pickled) < 1000
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), features["layer1"])
    again = pickle.loads(pickled, buffers=buffers)
    assert np.shares_memory(again["layer1"], features["layer1"])


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_forked_child_has_a_connection_of_its_own(address: str, shared_memory: bool) -> None:
    """A child may use and close its parent's client; the parent's own keeps working."""
    forks(address, "client", shared_memory=shared_memory)


def test_a_stream_stays_with_its_process(address: str) -> None:
    """A forked child can't read its parent's stream, and does not end it."""
    forks(address, "stream", shared_memory=False)


def test_gevent_without_grpcs_consent_is_an_error(address: str) -> None:
    """Instead of letting the program hang, the client raises and says what to call."""
    pytest.importorskip("gevent")
    for told, want in (("told", "5\n"), ("not told", "ConfigError gevent has patched")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GEVENT, address, told],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.startswith(want)
        assert told == "told" or "init_gevent()" in done.stdout


def test_grpc_still_tells_whether_gevent_is_on() -> None:
    """The attribute of gRPC that the check reads exists, and is false without gevent."""
    from grpc._cython import cygrpc

    assert cygrpc.g_gevent_activated is False
