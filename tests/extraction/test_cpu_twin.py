"""A model on a GPU never gets a sample on which it would fail; see ``extraction.cpu_twin``.

No GPU is needed: a model on the CPU that has a twin must not raise an error either, as on a GPU the
same error would be a failed assertion.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lookupnets
from asking import ask
from layertap.engine import Engine
from layertap.engine.host import measured_model
from layertap.errors import InvalidInputError, LayertapError
from layertap.extraction import PlanBuilder, Taps, measure
from layertap.extraction.cpu_twin import CpuTwin, with_twin
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.samples import ordinary_batch, reaching_batches
from layertap.extraction.trial import tried
from layertap.models import Batch, LoadedModel, ModelSpec, load_model
from layertap.selection import Capture
from quick import QUICK


def rounds() -> LoadedModel:
    """Return a model that rounds its numbers to rows of a table."""
    return load_model(ModelSpec("lookupnets:Rounds", item_shape=(3,), input_dtype="float32"))


def tables() -> LoadedModel:
    """Return a model whose table of positions ends the lengths that it takes."""
    return tried(load_model(ModelSpec("lookupnets:TwoTables", item_shape=(8,))))


def counting(model: LoadedModel, file: Path) -> None:
    """Write the index errors that a model's module raises from now on into a file.

    A list would be state of the model, which is restored after each pass.
    """
    name = str(file)
    inner = type(model.module).forward

    class Counting(type(model.module)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            try:
                return inner(self, *args)
            except IndexError as error:
                with open(name, "a", encoding="utf-8") as opened:  # noqa: PTH123
                    opened.write(f"{error}\n")
                raise

    file.touch()
    model.module.__class__ = Counting


def used(model: LoadedModel) -> None:
    """Measure a model and prove a plan of each extractor for each of its layers."""
    with torch.inference_mode():
        catalogue = measure(model)
        builder = PlanBuilder(model, Taps(model.module), catalogue)
        for extractor in QUICK:
            points = [
                entry.points[Capture.OUTPUT]
                for entry in catalogue
                if entry.calls and entry.serves(extractor, Capture.OUTPUT)
            ]
            if points:
                with suppress(LayertapError):
                    builder.build(extractor, PassSpec(tuple(points[-1:])), model.signature.key)


@pytest.mark.parametrize("load", [rounds, tables])
def test_no_sample_makes_a_model_with_a_twin_fail(
    load: Callable[[], LoadedModel], tmp_path: Path
) -> None:
    """The samples that it would refuse, it refuses without running them."""
    model = load()
    counting(model, tmp_path / "bare")
    used(model)
    assert "out of" in (tmp_path / "bare").read_text("utf-8"), "no sample has such an index"
    model = load()
    model = replace(model, twin=CpuTwin(copy.deepcopy(model.module)))
    counting(model, tmp_path / "twinned")
    used(model)
    assert (tmp_path / "twinned").read_text("utf-8") == ""


def test_the_catalogue_is_the_same_with_a_twin() -> None:
    """Which layers are served does not depend on where samples fail."""
    model = rounds()
    twinned = replace(rounds(), twin=CpuTwin(lookupnets.Rounds().eval()))
    with torch.inference_mode():
        plain, mine = measure(model), measure(twinned)
    assert list(plain.entries) == list(mine.entries)
    for name, entry in plain.entries.items():
        for extractor in entry.support:
            served = [each.entry(name).serves(extractor, Capture.OUTPUT) for each in (plain, mine)]
            assert served[0] == served[1], (name, extractor)


def test_refused_batches_stay_refused() -> None:
    """Items of it, copies and batches that contain it are refused as well, with the words."""
    model = replace(rounds(), twin=CpuTwin(lookupnets.Rounds().eval()))
    refused = [batch for batch in reaching_batches(model) if batch.refusal]
    assert refused
    for batch in (refused[0].clone(), refused[0].narrow(0, 1), Batch.cat([refused[0]] * 2)):
        with pytest.raises(RuntimeError, match="out of bounds|out of range"):
            model.forward(batch)
    ordinary = ordinary_batch(model, 2)
    assert ordinary.refusal == ""
    model.forward(ordinary)


def test_each_sample_runs_once_on_the_twin() -> None:
    """The same sample costs no second pass; other values and sizes are samples of their own."""
    twin = CpuTwin(lookupnets.Rounds().eval())
    model = replace(rounds(), twin=twin)
    for _ in range(3):
        ordinary_batch(model, 2)
    assert len(twin._known) == 1
    ordinary_batch(model, 3)
    list(reaching_batches(model))
    assert len(twin._known) == 4


def test_a_text_that_is_too_long_never_reaches_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A request with a length that was not tried yet is tried on the twin, and refused."""

    def twinned(model: LoadedModel) -> LoadedModel:
        twin = CpuTwin(copy.deepcopy(model.module))
        counting(model, tmp_path / "errors")
        return replace(model, twin=twin)

    monkeypatch.setattr(measured_model, "with_twin", twinned)
    engine = Engine()
    try:
        engine.load(ModelSpec("lookupnets:TwoTables", "tables", item_shape=(8,)))
        for length in (5, 12):
            ids = torch.randint(0, 30, (2, length))
            assert ask(engine, "tables", "positions", ids).torch()["positions"].shape[0] == length
        for length in (13, 500):
            ids = torch.randint(0, 30, (2, length))
            words = rf"can't run .*\[{length}\].* out of range"
            with pytest.raises(InvalidInputError, match=words):
                ask(engine, "tables", "positions", ids)
        assert (tmp_path / "errors").read_text("utf-8") == ""
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("net", "item", "indexes"),
    [
        ("lookupnets:Rounds", (3,), True),
        ("tinynets:residual", (3, 32, 32), False),
        ("lookupnets:TwoTables", (8,), True),
    ],
)
def test_only_models_that_index_have_a_twin(net: str, item: tuple[int, ...], indexes: bool) -> None:
    """A convolutional network has none, so it takes no more memory and loads no slower."""
    model = tried(load_model(ModelSpec(net, item_shape=item)))
    assert CpuTwin(copy.deepcopy(model.module)).indexes(model) is indexes
    assert with_twin(model) is model  # It is on the CPU.


def test_a_model_that_does_not_run_on_the_cpu_has_no_twin(caplog: pytest.LogCaptureFixture) -> None:
    """That is logged, and the samples run where the model is."""
    model = replace(rounds(), device=torch.device("meta"), module=Stubborn())
    assert with_twin(model).twin is None
    assert "no copy of it runs on the CPU" in caplog.text


class Stubborn(torch.nn.Module):
    """Can't be copied."""

    def __deepcopy__(self, memo: object) -> torch.nn.Module:
        raise RuntimeError("not this one")
