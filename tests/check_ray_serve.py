"""Ray Serve under load: replicas are killed, replaced by another version, added and taken away.

Run it by ``make test-ray``: minutes, as Ray starts and stops processes slowly.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from PIL import Image
from ray import serve

from layertap import Client
from layertap.errors import LayertapError, UnavailableError
from layertap.ray.serve import app
from ports import free_port
from rays import local_cluster, replicas, serving

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

CALLERS = 12
ONGOING = 4
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "deploy" / "ray" / "serve.yaml"
PAGE = ROOT / "docs" / "ray.md"


def model(factory: str) -> list[dict[str, Any]]:
    return [{"name": "net", "source": f"slownets:{factory}", "item_shape": [3, 4, 4]}]


def deploy(factory: str, **deployment: Any) -> None:
    """Deploy an application, or update it, and wait until it runs."""
    args = {
        "models": model(factory),
        "server": {"plan_cache": "off", "keep_memory": False},
        "deployment": {"max_ongoing_requests": ONGOING, **deployment},
    }
    serve.run(app(args), name="net", route_prefix="/net")


@pytest.fixture(scope="module")
def proxy() -> Iterator[str]:
    """The address of the gRPC proxy of a local cluster."""
    with local_cluster(), serving() as address:
        yield address


@pytest.fixture
def client(proxy: str) -> Iterator[Client]:
    """A client of the application; the application is removed at the end."""
    with Client(proxy, metadata={"application": "net"}) as client:
        yield client
    serve.delete("net")


class Load:
    """Callers that call again and again, each with an input of its own.

    Args:
        client: The client that they share.
        milliseconds: How long a pass takes.

    Attributes:
        done: The factor by which each call's values were multiplied, with the time of its end.
        failed: The errors; the call was then made again.
        wrong: The calls whose values were those of no version of the model.
    """

    def __init__(self, client: Client, milliseconds: float) -> None:
        self.done: list[tuple[float, float]] = []
        self.failed: list[LayertapError] = []
        self.wrong: list[int] = []
        self._client = client
        self._milliseconds = milliseconds
        self._stopped = threading.Event()

    @contextmanager
    def running(self, callers: int = CALLERS) -> Iterator[None]:
        """Make calls during the block."""
        threads = [threading.Thread(target=self._call, args=(n,)) for n in range(callers)]
        for each in threads:
            each.start()
        try:
            yield
        finally:
            self._stopped.set()
            for each in threads:
                each.join()

    def wait_for(self, calls: int) -> None:
        """Wait until this many calls more have been answered."""
        wanted = len(self.done) + calls
        wait_until(lambda: len(self.done) >= wanted)

    def _call(self, number: int) -> None:
        random = np.random.default_rng(number)
        while not self._stopped.is_set():
            x = random.random((1, 3, 4, 4), np.float32)
            x[0, 0, 0, 0] = self._milliseconds
            while (found := self._answer(x)) is None:
                pass
            factor = float(np.median(found / x.mean((2, 3), keepdims=True)))
            self.done.append((time.monotonic(), round(factor, 4)))
            if round(factor, 4) not in (1.0, 2.0):
                self.wrong.append(number)

    def _answer(self, x: np.ndarray) -> np.ndarray | None:
        """Make a call; return None if it must be made again."""
        try:
            return self._client.extract("net", x, "pool", extractor="hook")["pool"]
        except UnavailableError as error:
            self.failed.append(error)
            return None


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    """Wait until a condition holds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.1)


def kill(replica: Any) -> None:
    """End a replica's process by SIGKILL."""
    pid = ray.get(replica.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def test_a_replica_is_killed(client: Client) -> None:
    """Only calls in flight on it fail, with UNAVAILABLE; made again, they are answered."""
    deploy("dozing", num_replicas=2)
    client.wait_ready(60)
    before = replicas("net")
    assert len(before) == 2
    load = Load(client, milliseconds=200)
    with load.running():
        load.wait_for(100)
        assert load.failed == []
        kill(min(before.items())[1])
        load.wait_for(100)
        failed = list(load.failed)
        wait_until(lambda: len(replicas("net").keys() - {min(before)}) == 2)
        load.wait_for(100)
    print(f"{len(load.done)} calls answered, {len(load.failed)} failed and were made again")
    assert load.wrong == []
    assert load.failed == failed
    assert 1 <= len(failed) <= ONGOING
    for error in failed:
        assert not error.refused
        assert "the replica that had the request was lost" in str(error)


def test_a_rolling_update(client: Client) -> None:
    """While the replicas are replaced by those of another version, no call fails."""
    deploy("dozing", num_replicas=2)
    client.wait_ready(60)
    load = Load(client, milliseconds=100)
    with load.running():
        load.wait_for(50)
        deploy("dozing_twice", num_replicas=2)
        updated = time.monotonic()
        load.wait_for(100)
    versions = {factor for _, factor in load.done}
    print(f"{len(load.done)} calls answered, {len(load.failed)} failed")
    assert (load.failed, load.wrong) == ([], [])
    assert versions == {1.0, 2.0}
    # A call that began before the update ended may still be the old version's.
    assert {factor for ended, factor in load.done if ended > updated + 1} == {2.0}


def test_autoscaling(client: Client) -> None:
    """Calls that wait bring a second replica; it leaves when they end, and no call fails."""
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 5,
        "metrics_interval_s": 1,
        "look_back_period_s": 2,
    }
    deploy("dozing", autoscaling_config=scaling)
    client.wait_ready(60)
    assert len(replicas("net")) == 1
    heavy, light = Load(client, milliseconds=100), Load(client, milliseconds=50)
    with heavy.running():
        wait_until(lambda: len(replicas("net")) == 2)
        heavy.wait_for(100)
    with light.running(callers=1):
        wait_until(lambda: len(replicas("net")) == 1)
        light.wait_for(20)
    for load in (heavy, light):
        print(f"{len(load.done)} calls answered, {len(load.failed)} failed")
        assert (load.failed, load.wrong) == ([], [])


def runs(application: str) -> bool:
    """Return whether an application runs; stop where it can't."""
    found = serve.status().applications.get(application)
    assert found is None or found.status != "DEPLOY_FAILED", found
    return found is not None and found.status == "RUNNING"


def run_serve(*args: str) -> Sequence[str]:
    """Run Ray's command line."""
    program = Path(sys.executable).with_name("serve")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
    }
    done = subprocess.run(
        [program, *args], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_example_file(proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``serve run`` takes the example's file, and the code of docs/ray.md what it serves.

    The models are small, and the ports are free ones.
    """
    document = yaml.safe_load(EXAMPLE.read_text())
    # The proxy of this cluster runs already.
    document["grpc_options"]["port"] = int(proxy.rpartition(":")[2])
    document["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    document["proxy_location"] = "HeadOnly"
    for each in document["applications"]:
        each["args"]["models"] = [
            {"name": "resnet50", "source": "usualnets:resnet10", "item_shape": [3, 64, 64]}
        ]
        each["runtime_env"] = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
        each["deployments"][0].setdefault("autoscaling_config", {})["min_replicas"] = 1
        each["deployments"][0]["ray_actor_options"]["num_cpus"] = 1
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    run_serve("run", "--non-blocking", str(file))
    try:
        wait_until(
            lambda: all(runs(each["name"]) for each in document["applications"]), seconds=600
        )
    except AssertionError:
        print(serve.status())
        raise
    Image.new("RGB", (96, 80), (9, 99, 199)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text("utf-8")
    blocks = re.findall(r"```py\n(.*?)```", page[: page.index("## Ray Data")], re.DOTALL)
    assert len(blocks) == 2
    first = blocks[0].replace("node-1:9000", proxy)
    for each in document["applications"]:
        names: dict[str, Any] = {"UnavailableError": UnavailableError}
        exec(first.replace('"vision"', repr(each["name"])), names)  # noqa: S102 - the page is ours
        assert names["features"]["avgpool"].shape == (1, 512, 1, 1)
        del names["features"]
        with Client(proxy, metadata={"application": each["name"]}) as names["client"]:
            exec(blocks[1], names)  # noqa: S102 - likewise
        assert names["features"]["avgpool"].shape == (1, 512, 1, 1)
        serve.delete(each["name"])
