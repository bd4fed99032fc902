"""A run for a large data set uses the fastest way to finish its program, and notes which it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from layertap.dataset import Outcome, extract
from layertap.dataset.batches import Way
from layertap.dataset.fastest import fastest_variant
from layertap.dataset.runners import Answer, Runner
from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.local import LocalModel
from layertap.selection import Extractor
from layertap.timings import Timings
from watched_runner import WatchedRunner

TORCHSCRIPT, HOOK, EXPORT = Extractor.TORCHSCRIPT, Extractor.HOOK, Extractor.EXPORT
CHANNELS_LAST = "channels_last"
ITEMS = 1001
"""More than those for which a run waits for a compiled program; with passes of 1.5 s for 5 of them,
a run takes five minutes."""


BEFORE_STOP = 150
"""Batches after which a run is interrupted: it has measured the variants and written shards."""


class Timed(WatchedRunner):
    """A real model whose answers say that a variant took a certain time.

    Args:
        model: The model.
        took: Seconds by variant; the others are refused.
    """

    def __init__(self, model: LocalModel, took: Mapping[str, float]) -> None:
        super().__init__(model)
        self.took = took
        self.asked: list[tuple[Extractor, str]] = []

    def answer(self, ask_model: Callable[[], Answer], extractor: Extractor, variant: str) -> Answer:
        """Note what was named, and say how long it took."""
        self.asked.append((extractor, variant))
        if variant not in self.took:
            raise ExtractorUnsupportedError("its proof failed")
        return replace(ask_model(), timings=Timings(compute_ns=int(self.took[variant] * 1e9)))


class Interrupted(Timed):
    """Waits for the user to press Ctrl-C, which a run notices a few times a second."""

    def __init__(self, model: LocalModel, took: Mapping[str, float]) -> None:
        super().__init__(model, took)
        self._stopped = threading.Event()

    def answer(self, ask_model: Callable[[], Answer], extractor: Extractor, variant: str) -> Answer:
        """Answer some batches, and the others once the run was interrupted."""
        if len(self.asked) > BEFORE_STOP:
            self._stopped.wait(60)
        return super().answer(ask_model, extractor, variant)

    def stop(self, progress: object) -> None:
        """Press Ctrl-C."""
        if len(self.asked) > BEFORE_STOP:
            self._stopped.set()
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npy file of random items."""
    path = tmp_path_factory.mktemp("items") / "items.npy"
    np.save(path, np.random.default_rng(0).random((ITEMS, 3, 16, 16), np.float32))
    return str(path)


def run(model: LocalModel | Runner, items: str, output: Path, **options: object) -> Outcome:
    given = {"batch_size": 5, **options}
    return extract(model, [items], ["layer1"], output, **given)


def planned(output: Path) -> Mapping[str, object]:
    """Return the plan in the manifest of an output."""
    return json.loads(Path(f"{output}.manifest.json").read_text("utf-8"))["plan"]


def test_the_fastest_way_serves_all_batches(model: LocalModel, items: str, tmp_path: Path) -> None:
    """The output has the bytes of a run that names it; the manifest and the outcome name it."""
    runner = Timed(model, {"": 2.0, CHANNELS_LAST: 1.0})
    outcome = run(runner, items, tmp_path / "out.npz")
    assert (outcome.extractor, outcome.variant) == (TORCHSCRIPT, CHANNELS_LAST)
    assert planned(tmp_path / "out.npz")["variant"] == CHANNELS_LAST
    batches = -(-ITEMS // 5)
    assert runner.asked[-batches:] == [(TORCHSCRIPT, CHANNELS_LAST)] * batches
    named = {"extractor": "torchscript", "variant": CHANNELS_LAST}
    run(model, items, tmp_path / "named.npz", **named)
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "named.npz").read_bytes()
    expected = model.extract(np.load(items)[:5], "layer1", extractor="hook")["layer1"].numpy()
    with np.load(tmp_path / "out.npz") as stored:
        np.testing.assert_allclose(stored["layer1"][:5], expected, 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("took", "options", "asked"),
    [
        ({"": 2.0, CHANNELS_LAST: 4.0}, {}, {"", CHANNELS_LAST}),
        ({"": 2.0}, {}, {"", CHANNELS_LAST}),
        ({"": 1.4, CHANNELS_LAST: 0.7}, {}, {""}),
        ({"": 2.0, CHANNELS_LAST: 1.0}, {"extractor": "torchscript"}, {""}),
    ],
    ids=["slower", "refused", "a short run", "named"],
)
def test_the_usual_way_otherwise(
    model: LocalModel,
    items: str,
    tmp_path: Path,
    *,
    took: Mapping[str, float],
    options: Mapping[str, object],
    asked: set[str],
) -> None:
    """Where it is the fastest or the only way, where measuring would not pay, or if it is named."""
    runner = Timed(model, took)
    outcome = run(runner, items, tmp_path / "out.npz", **options)
    assert (outcome.extractor, outcome.variant) == (TORCHSCRIPT, "")
    assert {variant for _, variant in runner.asked} == asked
    assert runner.asked[-50:] == [(TORCHSCRIPT, "")] * 50


def test_an_interrupted_run_keeps_the_variant(
    model: LocalModel, items: str, tmp_path: Path
) -> None:
    """Although another one would be measured as the fastest by then."""
    run(Timed(model, {"": 2.0, CHANNELS_LAST: 1.0}), items, tmp_path / "whole.npz")
    broken = Interrupted(model, {"": 2.0, CHANNELS_LAST: 1.0})
    with pytest.raises(KeyboardInterrupt):
        run(broken, items, tmp_path / "out.npz", report=broken.stop, shard_items=50)
    runner = Timed(model, {"": 2.0, CHANNELS_LAST: 4.0})
    outcome = run(runner, items, tmp_path / "out.npz", shard_items=50)
    assert outcome.shards_before > 0
    assert set(runner.asked) == {(TORCHSCRIPT, CHANNELS_LAST)}
    with np.load(tmp_path / "out.npz") as stored, np.load(tmp_path / "whole.npz") as whole:
        assert np.array_equal(stored["layer1"], whole["layer1"])


@pytest.mark.parametrize(
    ("extractor", "variant", "expected"),
    [
        ("auto", CHANNELS_LAST, "got 'channels_last', expected one of the extractor auto: none"),
        ("torchscript", "sideways", "got 'sideways', .* torchscript: 'channels_last'"),
    ],
)
def test_a_variant_that_there_is_not_is_refused(
    model: LocalModel, items: str, tmp_path: Path, *, extractor: str, variant: str, expected: str
) -> None:
    """Before anything runs or is written."""
    with pytest.raises(InvalidInputError, match=expected):
        run(model, items, tmp_path / "out.npz", extractor=extractor, variant=variant)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("way", "others"),
    [
        (Way(TORCHSCRIPT, CHANNELS_LAST), []),
        (Way(TORCHSCRIPT, CHANNELS_LAST, fallback=True), [TORCHSCRIPT, HOOK]),
        (Way(TORCHSCRIPT, fallback=True), [HOOK, Extractor.FX]),
        (Way(EXPORT, fallback=True), [HOOK, Extractor.FX]),
    ],
)
def test_what_serves_a_batch_that_a_way_can_not(way: Way, others: Sequence[Extractor]) -> None:
    """A variant's own program in the usual way first; EXPORT may have won a race of a server."""
    found = [each for each in way.others() if each is not EXPORT]
    assert found[: len(others)] == list(others)
    assert bool(found) == bool(others)


def test_each_variant_races_the_fastest_so_far() -> None:
    """The first run of each, which may compile, is not counted; one that is refused is left out."""
    seconds = {"": 4.0, "a": 3.0, "b": 3.5, "c": 1.0}
    runs: list[str] = []

    def measured(variant: str) -> float:
        runs.append(variant)
        if variant == "refused":
            raise ExtractorUnsupportedError("its proof failed")
        return seconds[variant] + 100 * (runs.count(variant) == 1)

    assert fastest_variant(measured, ["a", "refused", "b", "c"]) == "c"
    assert runs.count("refused") == 1
    assert fastest_variant(lambda variant: 1.0, ["a", "b"]) == ""
