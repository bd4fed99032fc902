"""Versions of a model replace each other without a failed request, and leave nothing behind."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kept import kept
from layertap import Extractor, Features, LayerSelection, errors
from layertap.batching import BatchPolicy
from layertap.engine import Call, Engine, ExtractionRequest, HostOptions, Inputs, Limits
from layertap.engine.versions import Versions
from layertap.models import ModelSpec
from layertap.services.native_form import NativeForm
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import TensorView
from versioned import HOLDS, ITEM, LAYERS, save, save_weights

SLEEPY = ModelSpec("slownets:sleepy", name="net", item_shape=ITEM)


@pytest.fixture(params=[1, 2])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine that runs one pass at a time, or two."""
    engine = Engine(Limits(pending=8), threads=1, instances=request.param, plan_cache=kept())
    yield engine
    engine.close()


def ask(
    engine: Engine,
    value: float = 1.0,
    layers: tuple[str, ...] = LAYERS,
    extractor: Extractor = Extractor.AUTO,
) -> Features:
    x = np.full((1, *ITEM), value, np.float32)
    view = TensorView("", of_array(x), x.shape, memoryview(x.tobytes()))
    chosen = tuple(LayerSelection(layer) for layer in layers)
    request = ExtractionRequest("net", Inputs((view,)), chosen, extractor, form=NativeForm)
    return Features(engine.extract(request, Call()).payload)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it never came true")


def spec(folder: Path, version: int) -> ModelSpec:
    save_weights(folder / "net.pth", version)
    return ModelSpec("versioned:build", "net", str(folder / "net.pth"), item_shape=ITEM)


# What torch and we ignore while we load and trace is ignored for all threads or for none: Python
# keeps one list of filters. An error in the wrong thread then refuses a plan, and its record in
# pytest's log keeps the model.
@pytest.mark.filterwarnings("ignore")
def test_former_versions_leave_nothing_behind(engine: Engine, tmp_path: Path) -> None:
    """Module, hooks and plans of a version are freed once the next one serves, compiled or not."""
    declared = [LayerSelection(layer) for layer in LAYERS]
    before = set(threading.enumerate())  # Of engines that other tests have left.
    former: list[weakref.ref[torch.nn.Module]] = []
    for version in range(1, 4):
        host = engine.replace(spec(tmp_path, version), declared if version % 2 else ())
        former.append(weakref.ref(host.model.module))
        del host
        # AUTO often enough for a compilation beside the requests, which the next version meets.
        for _ in range(6):
            for layer in LAYERS:
                assert (ask(engine, layers=(layer,))[layer] == version * HOLDS[layer]).all()
        ask(engine, extractor=Extractor.FX)
    wait_for(lambda: [module() is None for module in former] == [True] * 2 + [False])
    names = Counter(thread.name for thread in threading.enumerate() if thread not in before)
    assert names["layertap-loader"] == 0
    assert names["layertap-promoter"] == 1


@pytest.mark.parametrize("leave", ["replace", "unload"])
def test_a_request_ends_in_the_version_where_it_began(
    engine: Engine, tmp_path: Path, leave: str
) -> None:
    """A model that is replaced or unloaded during a request still answers it, and then leaves."""
    module = weakref.ref(engine.load(SLEEPY).model.module)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, engine, 1500.0, ("conv",), Extractor.HOOK)
        wait_for(lambda: engine.pending == 1)
        if leave == "replace":
            engine.replace(spec(tmp_path, 3))
            assert (ask(engine)["second"] == 3).all()
        else:
            engine.unload("net", wait=False)
            with pytest.raises(errors.ModelNotFoundError):
                ask(engine)
        assert slow.result()["conv"].shape == (1, 2, 4, 4)
    del slow
    wait_for(lambda: module() is None)


def test_a_former_version_waits_for_its_last_request(engine: Engine, tmp_path: Path) -> None:
    """Between two jobs of a request its version keeps its hooks, whatever else has ended."""
    host = engine.load(spec(tmp_path, 1))
    between, go_on = threading.Event(), threading.Event()
    resolve = host.resolve

    def slowly(*args: object) -> object:
        between.set()
        assert go_on.wait(60)
        return resolve(*args)

    host.resolve = slowly  # As a scheduler may stop a request anywhere.
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(ask, engine, extractor=Extractor.HOOK)
        assert between.wait(60)
        engine.replace(spec(tmp_path, 2))
        for _ in range(3):
            assert (ask(engine)["second"] == 2).all()
        go_on.set()
        features = old.result()
    assert [float(features[layer].flat[0]) for layer in LAYERS] == [3, 1, 5]


@pytest.mark.parametrize("declared", [("frist",), ()])
def test_a_version_that_fails_changes_nothing(
    engine: Engine, tmp_path: Path, declared: tuple[str, ...]
) -> None:
    """If the new version can't be loaded or lacks a layer, the old version keeps serving."""
    engine.load(spec(tmp_path, 1))
    broken = spec(tmp_path, 2)
    if not declared:
        (tmp_path / "net.pth").write_bytes(b"no weights")
    with pytest.raises(errors.LayertapError):
        engine.replace(broken, [LayerSelection(layer) for layer in declared])
    assert (ask(engine)["second"] == 1).all()
    assert [host.model.name for host in engine.hosts()] == ["net"]


def test_a_full_queue_does_not_refuse_a_new_version(tmp_path: Path) -> None:
    """The server's own work is not refused when requests are, so a busy server can reload."""
    engine = Engine(Limits(pending=2), threads=1, plan_cache=kept())
    engine.load(SLEEPY)
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(ask, engine, 1000.0, ("conv",), Extractor.HOOK) for _ in range(2)]
        wait_for(lambda: engine.pending == 2)
        with pytest.raises(errors.OverloadedError):
            ask(engine, layers=("conv",))
        engine.replace(spec(tmp_path, 2))
        assert [len(one.result()) for one in slow] == [1, 1]
    assert (ask(engine)["second"] == 2).all()
    engine.close()


def test_a_load_that_hangs_can_be_given_up(engine: Engine, tmp_path: Path) -> None:
    """A cancelled call ends a load at once, requests are served meanwhile, the name stays free."""
    engine.load(spec(tmp_path, 1))
    call = Call()
    with ThreadPoolExecutor(1) as pool:
        never = ModelSpec("slownets:never", "net", item_shape=ITEM)
        loading = pool.submit(engine.replace, never, call=call)
        for _ in range(3):
            assert (ask(engine)["second"] == 1).all()
        call.cancel()
        with pytest.raises(errors.CancelledError):
            loading.result()
    assert (ask(engine)["second"] == 1).all()


def test_expected_models_are_unavailable_until_they_serve(engine: Engine, tmp_path: Path) -> None:
    """Requests for a model that is not loaded yet say so, and lists keep the expected order."""
    engine.expect(["net", "other"])
    with pytest.raises(errors.UnavailableError, match="'net' is not ready: it is being loaded"):
        ask(engine)
    save(tmp_path / "other.pt", 2)
    engine.load(ModelSpec(str(tmp_path / "other.pt"), item_shape=ITEM))
    engine.explain("net", "it is ill")
    with pytest.raises(errors.UnavailableError, match="'net' is not ready: it is ill"):
        ask(engine)
    engine.load(spec(tmp_path, 1))
    assert [host.model.name for host in engine.hosts()] == ["net", "other"]
    engine.expect(["other", "net"])
    assert [host.model.name for host in engine.hosts()] == ["other", "net"]


def test_a_version_is_taken_away_after_its_last_user() -> None:
    """A version waits for its users before it is removed; later users get the next version."""
    versions: Versions[str] = Versions()
    versions.publish("net", "old")
    with ThreadPoolExecutor(1) as pool:
        with versions.lease("net") as used:
            former = versions.publish("net", "new")
            assert former is not None
            taken = pool.submit(former.take)
            with versions.lease("net") as later:
                assert (used, later) == ("old", "new")
            with pytest.raises(TimeoutError):
                taken.result(timeout=0.2)
        assert taken.result() == "old"


def test_closing_waits_for_what_is_being_unloaded(tmp_path: Path) -> None:
    """The engine is closed once nobody uses the version that was unloaded in the background."""
    engine = Engine(threads=1, plan_cache=kept())
    engine.load(spec(tmp_path, 1))
    closing = threading.Thread(target=engine.close)
    with engine.lease("net"):
        engine.unload("net", wait=False)
        closing.start()
        closing.join(0.5)
        assert closing.is_alive()
    closing.join(60)
    assert not closing.is_alive()


def test_declared_layers_know_the_batch_sizes_that_requests_share(tmp_path: Path) -> None:
    """No first request waits for a proof that a pass of so many items may be shared."""
    engine = Engine(threads=1, plan_cache=kept())
    options = HostOptions(batching=BatchPolicy(max_size=4, max_delay=0.01))
    host = engine.load(spec(tmp_path, 1), [LayerSelection("second")], options=options)
    plans = list(host.plans._declared.values())
    assert plans
    known = [[plan.findings.shares(size) for size in (2, 3, 4)] for plan in plans]
    engine.close()
    assert all(shares is not None for sizes in known for shares in sizes)
