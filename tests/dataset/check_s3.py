"""Inputs and outputs in S3, with moto's server: `make test-s3`.

s3fs and moto need older versions of what other tests use, so they have an environment of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from layertap import load
from layertap.dataset import Outcome, extract
from layertap.dataset.remote_workplace import RemoteWorkplace
from layertap.dataset.sources import gather
from layertap.errors import InvalidInputError
from layertap.local import LocalModel

BUCKET = "bucket"
ITEMS, SHARD, KILLS = 48, 8, 10
SHARDS = ITEMS // SHARD
LAYERS = ["layer1", "avgpool:reduce=flatten=pooled"]
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["layertap.local", "layertap.dataset"])


@pytest.fixture(scope="module", autouse=True)
def bucket() -> Iterator[Any]:
    """A server with the bucket, and fsspec's file system of it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    fs = fsspec.filesystem("s3")
    fs.mkdir(BUCKET)
    yield fs
    server.stop()


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    with load("tinynets:residual", item_shape=[3, 16, 16], threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def items(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of random items."""
    path = tmp_path_factory.mktemp("items") / "items.npy"
    np.save(path, np.random.default_rng(0).random((ITEMS, 3, 16, 16), np.float32))
    bucket.put_file(str(path), "bucket/items.npy")
    return "s3://bucket/items.npy"


def run(model: LocalModel, items: str, output: str, **options: Any) -> Outcome:
    given = {"extractor": "hook", "batch_size": 4, "shard_items": SHARD, **options}
    return extract(model, [items], LAYERS, output, **given)


def content(fs: Any, prefix: str) -> dict[str, bytes]:
    """Return the objects whose names begin with a prefix."""
    fs.invalidate_cache()
    names = [name for name in fs.find(BUCKET) if name.startswith(f"bucket/{prefix}")]
    return {name.removeprefix(f"bucket/{prefix}"): fs.cat_file(name) for name in names}


def test_inputs(bucket: Any, items: str) -> None:
    """Folders, globs, files and rows; a changed object has another stamp."""
    for name in ("photos/z.jpg", "photos/a/b.png", "photos/notes.md", "photos/.hidden.jpg"):
        bucket.pipe_file(f"bucket/{name}", name.encode())
    source = gather(["s3://bucket/photos"])
    assert [source.id(i) for i in range(len(source))] == [
        "s3://bucket/photos/a/b.png", "s3://bucket/photos/z.jpg"
    ]  # fmt: skip
    assert source.read(1) == b"photos/z.jpg"
    assert len(gather(["s3://bucket/photos/**/*.png"])) == 1
    assert len(gather([items])) == ITEMS
    assert gather([items]).read(3)[""].shape == (3, 16, 16)
    before = source.stamp(1)
    bucket.pipe_file("bucket/photos/z.jpg", b"photos/z.jpG")
    bucket.invalidate_cache()
    assert gather(["s3://bucket/photos"]).stamp(1) != before
    with pytest.raises(InvalidInputError, match="no such file"):
        gather(["s3://bucket/none.jpg"])


def in_process(items: str, output: str, begun: Any) -> None:
    with load("tinynets:residual", item_shape=[3, 16, 16], threads=1) as model:
        begun.set()
        run(model, items, output)


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_killed_runs_continue(model: LocalModel, bucket: Any, items: str, suffix: str) -> None:
    """After kill -9 at random moments, the objects have the same bytes as without it."""
    started = time.perf_counter()
    run(model, items, f"s3://bucket/whole.{suffix}")
    seconds = time.perf_counter() - started
    for number in range(KILLS):
        output, begun = f"s3://bucket/run{number}.{suffix}", FORKING.Event()
        process = FORKING.Process(target=in_process, args=(items, output, begun))
        process.start()
        assert begun.wait(60)
        while RemoteWorkplace(output).started() is None and process.is_alive():
            time.sleep(0.01)
        time.sleep(random.random() * seconds)
        process.kill()
        process.join()
        process.close()
        place = RemoteWorkplace(output)
        there = SHARDS if place.complete() else len(place.records())
        sent = [name for name in content(bucket, f"run{number}.{suffix}/") if "part-" in name]
        outcome = run(model, items, output)
        sys.stderr.write(f"{suffix}: killed with {len(sent)} of {SHARDS} shards, {there} noted\n")
        assert outcome.shards_before == there
        assert len(sent) - there in (0, 1)
        assert content(bucket, f"run{number}.") == content(bucket, "whole.")


def test_overwrite_and_failures(model: LocalModel, bucket: Any, items: str, tmp_path: Path) -> None:
    """Shards of a former output do not stay."""
    run(model, items, "s3://bucket/over.parquet", shard_items=4)
    with pytest.raises(InvalidInputError, match="shard_items: 4 before, 8 now"):
        run(model, items, "s3://bucket/over.parquet")
    run(model, items, "s3://bucket/over.parquet", overwrite=True)
    assert sum("part-" in name for name in content(bucket, "over.parquet/")) == SHARDS
