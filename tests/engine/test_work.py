"""Requests that share a forward pass get the same values as alone.

What is right is computed by nets of the tests' own: a hook on a served one would see the passes of
the promoter as well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import batchnets
import oddnets
import tinynets
from asking import request_for
from kept import kept
from layertap import Extractor, LayerSelection, errors
from layertap.batching import BatchPolicy
from layertap.engine import Call, Engine, Extraction, HostOptions
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from oracle import outputs_of
from quick import QUICK
from tinynets import ITEM
from together import Together, asking, threads

EIGHT = BatchPolicy(max_size=8)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models."""
    engine = Engine(plan_cache=kept())
    yield engine
    engine.close()


def load(engine: Engine, source: str, *declared: str, **options: bool) -> list[int]:
    """Load a net that serves up to eight items per pass; return the sizes of its later passes."""
    name = source.rpartition(":")[2]
    layers = [LayerSelection.parse(layer) for layer in declared]
    spec = ModelSpec(source, name, item_shape=ITEM)
    module = engine.load(spec, layers, options=HostOptions(batching=EIGHT, **options)).model.module
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def inputs(*sizes: int) -> list[np.ndarray]:
    """Return a batch of random items for each size."""
    made = np.random.default_rng(0)
    return [made.random((size, *ITEM), dtype=np.float32) for size in sizes]


@pytest.mark.parametrize("extractor", QUICK)
def test_each_gets_what_it_would_have_got_alone(engine, extractor) -> None:
    """Four requests of different sizes share one pass; each gets the values of its own items."""
    sizes = load(engine, "tinynets:residual")
    layers, batches = ["conv1", "layer1", "avgpool"], inputs(1, 2, 1, 3)
    asked = asking(engine, "residual", layers, batches, extractor)
    Together(engine, asked)  # The first batch proves that passes may be shared.
    sizes.clear()
    together = Together(engine, asked)
    module = tinynets.residual()
    assert together.shared == [4, 4, 4, 4]
    if extractor is Extractor.HOOK:
        assert sizes == [7]
    for x, values in zip(batches, together.values(), strict=True):
        for layer in layers:
            alone = outputs_of(module, torch.from_numpy(x), layer)[0]
            assert difference(values[layer], alone) <= COMPILED_TOLERANCE[torch.float32]


def test_declared_layers_share_compiled_passes(engine) -> None:
    """Their plans are proven when the model is loaded, and serve batches with TORCHSCRIPT."""
    load(engine, "tinynets:residual", "layer1")
    asked = asking(engine, "residual", "layer1", inputs(1, 1, 1), Extractor.AUTO)
    together = Together(engine, asked)
    assert together.shared == [3, 3, 3]
    assert {done.result().extractor for done in together.done} == {Extractor.TORCHSCRIPT}


@pytest.mark.parametrize("net", ["mixes", "interleaved"])
def test_a_net_whose_items_depend_on_each_other_is_never_shared(engine, net) -> None:
    """A shared batch would silently give wrong values; each request gets its own pass."""
    load(engine, f"batchnets:{net}")
    layer = "tail" if net == "mixes" else "windows"
    batches = inputs(1, 1, 1)
    asked = asking(engine, net, layer, batches)
    module = getattr(batchnets, net)()
    for together in (Together(engine, asked), Together(engine, asked)):
        assert together.shared == [1, 1, 1]
        for x, values in zip(batches, together.values(), strict=True):
            truth = outputs_of(module, torch.from_numpy(x), layer)[0]
            assert torch.allclose(values[layer], truth, atol=1e-5)
    naive = outputs_of(module, torch.from_numpy(np.concatenate(batches)), layer)[0]
    first = outputs_of(module, torch.from_numpy(batches[0]), layer)[0]
    assert not torch.allclose(naive[: len(first)], first, atol=1e-3)


def test_a_net_that_looks_at_values_is_never_shared(engine) -> None:
    """Random items don't show it, but one large item would change the others' values."""
    load(engine, "batchnets:turns")
    batches = inputs(1, 1)
    batches[1] += 3
    together = Together(engine, asking(engine, "turns", "tail", batches))
    assert together.shared == [1, 1]
    module = batchnets.turns()
    for x, values in zip(batches, together.values(), strict=True):
        truth = outputs_of(module, torch.from_numpy(x), "tail")[0]
        assert torch.allclose(values["tail"], truth, atol=1e-5)


def test_the_batch_need_not_be_the_first_dimension(engine) -> None:
    """Values are split along whichever dimension grows with the batch, for items of any size."""
    load(engine, "batchnets:axes")
    batches = inputs(1, 3, 2)
    asked = asking(engine, "axes", ["sequence", "windows"], batches)
    Together(engine, asked)
    together = Together(engine, asked)
    assert together.shared == [3, 3, 3]
    module = batchnets.axes()
    for x, values in zip(batches, together.values(), strict=True):
        assert values["sequence"].shape == (16, len(x), 6)
        assert values["windows"].shape == (4 * len(x), 4, 6)
        for layer, value in values.items():
            alone = outputs_of(module, torch.from_numpy(x), layer)[0]
            assert difference(value, alone) <= COMPILED_TOLERANCE[torch.float32]


def test_different_questions_do_not_share(engine) -> None:
    """Other layer sets and other item shapes have their own passes."""
    load(engine, "tinynets:residual")
    x, larger = inputs(1)[0], np.zeros((1, 3, 24, 24), np.float32)
    asked = [
        *asking(engine, "residual", "layer1", [x, x]),
        *asking(engine, "residual", "layer2", [x]),
        *asking(engine, "residual", "layer1", [larger]),
    ]
    Together(engine, asked)
    assert Together(engine, asked).shared == [2, 2, 1, 1]


def test_no_batch_is_larger_than_allowed(engine) -> None:
    """An item that does not fit waits for the next pass."""
    sizes = load(engine, "tinynets:residual")
    asked = asking(engine, "residual", "layer1", inputs(3, 4, 3, 9))
    Together(engine, asked)
    sizes.clear()
    assert Together(engine, asked).shared == [2, 2, 1, 1]
    assert sizes == [7, 3, 9]


def test_one_bad_item_fails_alone(engine) -> None:
    """Its caller gets the error, and the others of the batch get their values."""
    load(engine, "tinynets:residual", require_finite=True)
    good, bad = inputs(1, 1)
    asked = asking(engine, "residual", "layer1", [good, good])
    bad[0, 0, 0, 0] = np.nan
    nan = request_for("residual", "layer1", bad, Extractor.HOOK)
    asked.append(lambda: engine.extract(nan, Call()))
    together = Together(engine, asked)
    with pytest.raises(errors.ModelRunError, match="holds NaN"):
        together.done.pop().result()
    module = tinynets.residual()
    alone = outputs_of(module, torch.from_numpy(good), "layer1")[0]
    for values in together.values():
        assert difference(values["layer1"], alone) <= COMPILED_TOLERANCE[torch.float32]


def test_a_cancelled_caller_is_not_computed_for(engine) -> None:
    """It is removed from the batch before the pass, which runs without it."""
    sizes = load(engine, "tinynets:residual")
    x, call = inputs(1)[0], Call()
    asked = asking(engine, "residual", "layer1", [x, x])
    Together(engine, asked)

    def gone() -> Extraction:
        threading.Timer(0.05, call.cancel).start()
        return engine.extract(request_for("residual", "layer1", x, Extractor.HOOK), call)

    sizes.clear()
    begun = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        go = threading.Event()

        def hold() -> None:
            begun.set()
            assert go.wait(60)

        pool.submit(threads(engine).run, hold, Call())
        assert begun.wait(60)
        done = [pool.submit(ask) for ask in (*asked, gone)]
        with pytest.raises(errors.CancelledError):
            done.pop().result(60)
        while len(threads(engine)._queue._batcher) < 2:
            threading.Event().wait(0.002)
        go.set()
        assert [each.result(60).together for each in done] == [2, 2]
    assert sizes == [2]


def test_a_pass_that_somebody_waits_for_is_not_given_up(engine) -> None:
    """If one of two callers leaves during their pass, the other still gets its values."""
    load(engine, "tinynets:residual")
    x, call = inputs(1)[0], Call()
    asked = asking(engine, "residual", "avgpool", [x])
    request = request_for("residual", "avgpool", x, Extractor.HOOK)
    Together(engine, [*asked, *asked])
    module = engine.host("residual").model.module
    module.conv1.register_forward_hook(lambda *_: call.cancel())
    together = Together(engine, [*asked, lambda: engine.extract(request, call)])
    assert together.shared == [2, 2]


def test_a_shared_pass_that_gives_other_rows_is_run_again_alone(engine) -> None:
    """An item that adds a row to a value must not shift the rows of the requests behind it.

    No sample shows it. Each request's number of rows could be taken from the larger value all the
    same, and the second one would silently get a row of the first.
    """
    load(engine, "oddnets:adds_rows")
    quiet, marked = inputs(1, 1)
    Together(engine, asking(engine, "adds_rows", "rows", [quiet, quiet]))
    marked[0, 0, 0, 0] = oddnets.MARK
    requests = [request_for("adds_rows", "rows", x, Extractor.HOOK) for x in (marked, quiet)]
    together = Together(engine, [partial(engine.extract, request, Call()) for request in requests])
    module = oddnets.adds_rows()
    for x, rows, values in zip((marked, quiet), (2, 1), together.values(), strict=True):
        truth = outputs_of(module, torch.from_numpy(x), "rows")[0]
        assert truth.shape[0] == rows
        assert difference(values["rows"], truth) == 0
    assert together.shared == [1, 1]


def test_a_net_whose_loud_items_quieten_others_is_never_shared(engine) -> None:
    """Random items in [0, 1) don't show how larger values affect each other."""
    load(engine, "oddnets:peaks")
    batches = inputs(1, 1)
    batches[1] *= 100
    together = Together(engine, asking(engine, "peaks", "tail", batches))
    assert together.shared == [1, 1]
    module = oddnets.peaks()
    for x, values in zip(batches, together.values(), strict=True):
        truth = outputs_of(module, torch.from_numpy(x), "tail")[0]
        assert torch.allclose(values["tail"], truth, atol=1e-5)


def test_a_program_that_looks_at_values_is_never_shared(engine, tmp_path: Path) -> None:
    """A TorchScript program branches for the whole batch, like the code it was made from."""
    file = tmp_path / "turns.pt"
    oddnets.script(batchnets.turns()).save(file)
    engine.load(ModelSpec(str(file), item_shape=ITEM), options=HostOptions(batching=EIGHT))
    batches = inputs(1, 1)
    batches[1] += 3
    together = Together(engine, asking(engine, "turns", "tail", batches))
    module = batchnets.turns()
    for x, values in zip(batches, together.values(), strict=True):
        truth = outputs_of(module, torch.from_numpy(x), "tail")[0]
        assert torch.allclose(values["tail"], truth, atol=1e-5)
    assert together.shared == [1, 1]


@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.TORCHSCRIPT])
def test_a_pass_of_more_items_than_were_tried_is_tried_first(engine, extractor) -> None:
    """Two requests that the net computes differently together than alone run alone."""
    load(engine, "oddnets:large_batches", "tail")
    module = oddnets.large_batches()
    for sizes, shared in (((2, 2), [2, 2]), ((3, 3), [1, 1]), ((2, 2), [2, 2])):
        batches = inputs(*sizes)
        together = Together(engine, asking(engine, "large_batches", "tail", batches, extractor))
        for x, values in zip(batches, together.values(), strict=True):
            truth = outputs_of(module, torch.from_numpy(x), "tail")[0]
            assert torch.allclose(values["tail"], truth, atol=1e-5)
        assert together.shared == shared
