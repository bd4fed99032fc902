"""Ray Data: kill -9 of the driver, and the same call again, until the output is complete.

Run it by ``make test-ray``: minutes, as each run starts a Ray cluster.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.timeout(1800)

ROWS, BLOCKS, KILLS = 2000, 50, 6

DRIVER = f"""
import sys
import numpy as np
import ray
import ray.data
from layertap.ray import extract_to_parquet
from rays import local_cluster

def pixels(rows):
    made = [np.random.default_rng(i).random((3, 16, 16), np.float32) for i in rows["id"]]
    return {{"id": rows["id"], "x": np.stack(made)}}

with local_cluster(4):
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.range({ROWS}, override_num_blocks={BLOCKS}).map_batches(pixels)
    done = extract_to_parquet(
        dataset, sys.argv[1], "tinynets:residual", ["layer1", "fc"], item_shape=(3, 16, 16),
        column="x", id_column="id", batch_size=7, actors=2,
    )
    print(done.rows, done.before)
"""


@pytest.fixture
def short() -> Iterator[str]:
    """A folder for Ray's sockets, whose paths must be short; a killed driver leaves them."""
    with tempfile.TemporaryDirectory(prefix="rays-", ignore_cleanup_errors=True) as folder:
        yield folder


def start(folder: Path, temporary: str) -> subprocess.Popen[str]:
    """Start a driver that writes to a folder."""
    environment = {
        "PYTHONPATH": str(Path(__file__).parent),
        "PATH": "/usr/bin:/bin",
        "TMPDIR": temporary,
    }
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", DRIVER, folder],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def parts(folder: Path) -> int:
    return len(list(folder.glob("part-*.parquet")))


def test_the_driver_is_killed(tmp_path: Path, short: str) -> None:
    """Every row is there exactly once, with the bits that it has in a run without interruption."""
    with start(tmp_path / "whole", short) as whole:
        out, _ = whole.communicate()
    assert out.split() == [str(ROWS), "0"]
    choose, seen = random.Random(0), []
    folder = tmp_path / "killed"
    while len(seen) < KILLS:
        with start(folder, short) as driver:
            before = parts(folder)
            # While the cluster starts there is nothing to interrupt.
            until = before + choose.randint(1, BLOCKS // KILLS)
            while parts(folder) < until and driver.poll() is None:
                time.sleep(0.01)
            driver.send_signal(signal.SIGKILL)
        seen.append(parts(folder))
        if driver.returncode == 0:
            break
    with start(folder, short) as driver:
        out, _ = driver.communicate()
    print(f"files after each kill: {seen} of {BLOCKS}; the last run: {out.strip()}")
    assert 0 < seen[0] < BLOCKS
    assert int(out.split()[0]) == ROWS
    assert int(out.split()[1]) > 0
    found, expected = (pq.read_table(tmp_path / name).sort_by("id") for name in ("killed", "whole"))
    assert found["id"].to_pylist() == list(range(ROWS))
    assert found.equals(expected)
