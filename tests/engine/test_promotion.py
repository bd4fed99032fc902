"""Layer sets that are requested often are compiled, and every answer meanwhile is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import tinynets
from asking import ask
from kept import kept
from layertap import Extractor, errors
from layertap.engine import Engine, Limits
from layertap.engine.host.choice import MAX_PROMOTED
from layertap.engine.promotion import PROMOTE_AFTER, Promoter
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from oracle import outputs_of
from tinynets import ITEM

PATIENCE = 60


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.long)])
def engine(request) -> Iterator[Engine]:
    """An engine with room for few plans, so that promoted ones are evicted and built again."""
    engine = Engine(Limits(plans=3), threads=1, instances=request.param, plan_cache=kept())
    yield engine
    engine.close()


def load(engine: Engine, *nets: str) -> None:
    for net in nets:
        engine.load(ModelSpec(f"tinynets:{net}", item_shape=ITEM))


def batch(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((2, *ITEM), dtype=np.float32)


def until(true: Callable[[], bool]) -> bool:
    """Repeat a request until it gives a result, up to a time limit."""
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        if true():
            return True
    return False


def test_hook_serves_at_once_and_the_compiled_plan_when_it_is_ready(engine) -> None:
    """HOOK gives the first answers and TORCHSCRIPT the later ones, and all of them are right."""
    load(engine, "residual")
    x = batch()
    net = engine.host("residual").model.module
    expected = outputs_of(net, torch.from_numpy(x), "layer2")[0]
    seen: list[Extractor] = []

    def promoted() -> bool:
        features = ask(engine, "residual", "layer2", x)
        seen.append(features.extractor)
        error = difference(features.torch()["layer2"], expected)
        assert error <= COMPILED_TOLERANCE[torch.float32]
        return features.extractor is Extractor.TORCHSCRIPT

    assert until(promoted)
    assert seen[: PROMOTE_AFTER - 1] == [Extractor.HOOK] * (PROMOTE_AFTER - 1)


def test_very_many_layers_are_not_compiled_beside_requests(engine) -> None:
    """A set with too many layers for background compilation stays with HOOK."""
    load(engine, "residual")
    x = batch()
    for _ in range(PROMOTE_AFTER * 3):
        features = ask(engine, "residual", "**", x)
        assert len(features) > MAX_PROMOTED
        assert features.extractor is Extractor.HOOK
    # Behind it, a set that is small enough is compiled.
    assert until(lambda: ask(engine, "residual", "layer2", x).extractor is Extractor.TORCHSCRIPT)
    assert ask(engine, "residual", "**", x).extractor is Extractor.HOOK


def test_code_that_looks_at_values_is_not_compiled(engine) -> None:
    """A trace takes the example's branch for every input, so it would not refuse any."""
    load(engine, "raises")
    large = np.full((2, *ITEM), 1e6, np.float32)
    for _ in range(PROMOTE_AFTER * 2):
        assert ask(engine, "raises", "head", batch()).extractor is Extractor.HOOK
    # Behind it, what is measured before the code looks is compiled.
    assert until(lambda: ask(engine, "raises", "conv", batch()).extractor is Extractor.TORCHSCRIPT)
    with pytest.raises(errors.ModelRunError):
        ask(engine, "raises", "head", large)
    with pytest.raises(errors.ExtractorUnsupportedError, match="branches on tensor values"):
        ask(engine, "raises", "head", large, Extractor.TORCHSCRIPT)


def test_content_dependent_sizes_survive_promotion(engine) -> None:
    """An output whose size depends on the content is right before, during and after compiling."""
    load(engine, "dynamic")
    # A net of its own: a naive hook on the served one would see the promoter's passes as well.
    net = tinynets.dynamic()
    for seed in range(40):
        x = batch(seed)
        picked = ask(engine, "dynamic", "pick", x).torch()["pick"]
        scores = outputs_of(net, torch.from_numpy(x), "score")[0]
        assert picked.shape == scores[scores > 0].shape
        assert difference(picked, scores[scores > 0]) <= COMPILED_TOLERANCE[torch.float32]
        if seed > PROMOTE_AFTER:
            time.sleep(0.01)


def test_no_answer_is_wrong_while_plans_come_and_go(engine) -> None:
    """8 threads, 4 models, a thousand requests, with plans compiled and evicted meanwhile."""
    load(engine, "residual", "dynamic", "branching", "tokens")
    wanted = [
        ("residual", "bn1"), ("residual", "layer1"), ("residual", "layer2"), ("residual", "fc"),
        ("branching", "second"), ("tokens", "embed"), ("tokens", "encoder"),
        ("dynamic", "score"),
    ]  # fmt: skip
    cases = []
    # Bit for bit holds for one number of threads, and the engine's is 1.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for net, layer in wanted:
        for seed in range(3):
            x = batch(seed)
            # Of a net of its own: a naive hook on the served one sees the promoter's passes.
            own = getattr(tinynets, net)()
            cases.append((net, layer, x, outputs_of(own, torch.from_numpy(x), layer)[0]))
    torch.set_num_threads(threads)
    served: set[Extractor] = set()

    def work(worker: int) -> int:
        wrong = 0
        for turn in range(120):
            # In runs, so that some layer set is asked for often enough to be compiled.
            net, layer, x, expected = cases[(worker * 5 + turn // 20) % len(cases)]
            features = ask(engine, net, layer, x)
            served.add(features.extractor)
            exact = features.extractor is not Extractor.TORCHSCRIPT
            tolerance = 0.0 if exact else COMPILED_TOLERANCE[torch.float32]
            wrong += difference(features.torch()[layer], expected) > tolerance
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0
    assert served == {Extractor.HOOK, Extractor.TORCHSCRIPT}


def test_a_promoter_asks_once_and_survives_errors() -> None:
    """The request that reaches the count starts the compilation; a failing one has no effect."""
    compiled: list[tuple[str, int]] = []
    done = threading.Event()

    def steps(key: str, example: int) -> Iterator[None]:
        compiled.append((key, example))
        yield
        if key == "fails":
            raise RuntimeError("planted")
        done.set()

    promoter = Promoter(steps)
    for number in range(PROMOTE_AFTER * 3):
        promoter.note("fails", lambda number=number: number)
    for _ in range(PROMOTE_AFTER - 1):
        promoter.note("rare", lambda: 0)
    for _ in range(PROMOTE_AFTER):
        promoter.note("works", lambda: 7)
    assert done.wait(PATIENCE)
    promoter.close()
    assert compiled == [("fails", PROMOTE_AFTER - 1), ("works", 7)]


def test_closing_gives_up_what_is_being_compiled() -> None:
    """A promoter that is closed during an endless compilation ends."""
    begun = threading.Event()

    def endless(key: str, _: object) -> Iterator[None]:
        while True:
            begun.set()
            yield

    promoter = Promoter(endless)
    for _ in range(PROMOTE_AFTER):
        promoter.note("key")
    assert begun.wait(PATIENCE)
    promoter.close()
