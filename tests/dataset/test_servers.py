"""Several servers share a run; a client without PyTorch can start one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from layertap import Client
from layertap.cli.main import main
from layertap.dataset.pipeline import Pipeline
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server
from tinynets import ITEM


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    """Two engines with the same model, and one with other weights."""
    with ExitStack() as stack:
        engines = [Engine(threads=1) for _ in range(3)]
        for engine in engines:
            stack.callback(engine.close)
            engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
        with torch.no_grad():
            engines[2].host("residual").model.module.conv1.weight += 1
        yield engines


@pytest.fixture(scope="module")
def addresses(engines: list[Engine]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running_server(engine)) for engine in engines]


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.npy"
    np.save(path, np.random.default_rng(0).random((40, *ITEM), np.float32))
    return path


def extract(items: Path, output: Path, *arguments: str) -> Result:
    command = ["extract", "residual", str(items), "-l", "layer1", "-o", str(output)]
    options = ["--extractor", "hook", "--batch-size", "2", "--shard-items", "8"]
    return CliRunner().invoke(main, [*command, *options, *arguments])


def test_servers_share_the_work(addresses: list[str], items: Path, tmp_path: Path) -> None:
    """The output is that of one server; each of them has run batches of its own."""
    one = extract(items, tmp_path / "one.npz", "--server", addresses[0])
    two = extract(
        items, tmp_path / "two.npz", "--server", addresses[0], "--server", addresses[1]
    )  # fmt: skip
    assert (one.exit_code, two.exit_code) == (0, 0), two.output
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_servers_with_other_weights_are_refused(
    addresses: list[str], items: Path, tmp_path: Path
) -> None:
    """Rows of two models are never in one output, and neither is a continued run of another."""
    mixed = extract(
        items, tmp_path / "out.npz", "--server", addresses[0], "--server", addresses[2]
    )  # fmt: skip
    assert mixed.exit_code == 1
    assert "have different models 'residual': fingerprint" in mixed.output
    assert not (tmp_path / "out.npz").exists()
    extract(items, tmp_path / "out.npz", "--server", addresses[0])
    other = extract(items, tmp_path / "out.npz", "--server", addresses[2])
    assert other.exit_code == 1
    assert "model.fingerprint: " in other.output


def test_the_fingerprint_is_told_on_request(addresses: list[str], engines: list[Engine]) -> None:
    """It is the digest of the model's weights, the same for the same weights."""
    told = []
    for address in addresses:
        with Client(address) as client:
            assert client.describe_model("residual").model.fingerprint == ""
            told.append(client.describe_model("residual", fingerprint=True).model.fingerprint)
    assert told[0] == told[1] == engines[0].host("residual").fingerprint()
    assert told[0] != told[2]


def test_a_server_that_stops_leaves_its_work_to_the_others(
    engines: list[Engine],
    addresses: list[str],
    items: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches that it did not answer are run by another server, and no item fails."""
    from layertap.dataset import extract as run
    from layertap.dataset.runners import RemoteRunner

    place, stopped = Pipeline._place, threading.Event()

    def held(*args: object) -> None:
        stopped.wait(60)  # However fast the run is, most batches are left when the server stops.
        place(*args)

    monkeypatch.setattr(Pipeline, "_place", held)
    with ExitStack() as stack:
        short = ExitStack()
        address = short.enter_context(running_server(engines[1]))
        clients = {
            each: stack.enter_context(Client(each, retries=0)) for each in (addresses[0], address)
        }

        def report(progress: object) -> None:
            if not stopped.is_set():
                short.close()
                stopped.set()

        outcome = run(
            RemoteRunner(clients, "residual"), [items], ["layer1"], tmp_path / "out.npz",
            extractor="hook", batch_size=1, shard_items=8, report=report,
        )  # fmt: skip
    assert (outcome.rows, outcome.failures) == (40, ())
