"""Compiled plans that each stand for one outcome of the model's looks at values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import guardnets
from layertap.errors import ExtractorUnsupportedError
from layertap.extraction import CapturePoint, Plan, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.guards import GuardTree
from layertap.extraction.kinds import torchscript
from layertap.extraction.kinds.torchscript import CHANNELS_LAST
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import PassScope
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.proof import collect
from layertap.extraction.trial import tried
from layertap.models import Batch, LoadedModel, ModelSpec, load_model
from layertap.selection import Extractor
from oracle import outputs_of

IMAGE = (3, 6, 6)
HEAD = PassSpec((CapturePoint(PointKind.MODULE, "head"),))
OUTCOMES = [("True",), ("False",)]


def loaded(net: str, item: tuple[int, ...] = IMAGE) -> LoadedModel:
    model = load_model(ModelSpec(f"guardnets:{net}", item_shape=item))
    with torch.inference_mode():
        return tried(model, PassScope(model.module))


def builder_of(model: LoadedModel, cache: PlanCache | None = None) -> PlanBuilder:
    return PlanBuilder(model, Taps(model.module), measure(model), cache)


def build(builder: PlanBuilder, model: LoadedModel, outcome: tuple[str, ...], **options) -> Plan:
    with torch.inference_mode():
        key = model.signature.key
        return builder.build(Extractor.TORCHSCRIPT, HEAD, key, outcome, **options)


def is_right(plan: Plan, net: nn.Module, x: torch.Tensor) -> bool:
    with torch.inference_mode():
        (value,) = collect(plan.built, plan.points, Batch({plan.batch_key.main.name: x}))
    return torch.allclose(value, outputs_of(net, x, "head")[0], atol=1e-5)


def test_plans_of_two_outcomes_are_stored_apart(tmp_path: Path, monkeypatch) -> None:
    """After a restart each outcome has its own program from the disk, and nothing is traced."""
    model = loaded("sign")
    for outcome in OUTCOMES:
        build(builder_of(model, PlanCache(tmp_path, 1 << 30)), model, outcome, keep=True)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(torchscript, "trace_taps", None)
    again = builder_of(model, PlanCache(tmp_path, 1 << 30))
    x = torch.rand(2, *IMAGE)
    for outcome, batch in zip(OUTCOMES, (x, -x), strict=True):
        plan = build(again, model, outcome, keep=True)
        assert plan.key.outcome == outcome
        assert is_right(plan, guardnets.sign(), batch)
        assert not is_right(plan, guardnets.sign(), -batch)


def test_a_program_that_looks_at_nothing_serves_every_outcome_that_it_is_proven_for() -> None:
    """Where the code does not look while it is traced, both outcomes have the same program."""
    model = loaded("words", (8,))
    builder = builder_of(model)
    first, second = (build(builder, model, outcome) for outcome in OUTCOMES)
    assert first.built is second.built
    assert first.key != second.key
    apart = loaded("plain_words", (8,))
    builder = builder_of(apart)
    first, second = (build(builder, apart, outcome) for outcome in OUTCOMES)
    assert first.built is not second.built


def test_an_outcome_that_no_batch_has_is_not_served() -> None:
    """A plan needs several batches of its outcome; without them it is refused, and says so."""
    model = loaded("sign")
    with pytest.raises(ExtractorUnsupportedError, match="only 0 batches with that outcome"):
        build(builder_of(model), model, ("Perhaps",))


def test_a_guard_that_differs_from_the_model_is_not_used(monkeypatch) -> None:
    """Each watched pass checks the guard; one that tells another outcome refuses the layers."""
    model = loaded("sign")
    builder = builder_of(model)
    x = Batch({model.signature.main.name: torch.rand(2, *IMAGE)})
    with torch.inference_mode():
        assert builder.outcomes.observe(HEAD, x) == ("True",)
        monkeypatch.setattr(GuardTree, "outcome", lambda tree, batch: ("False",))
        with pytest.raises(ExtractorUnsupportedError, match="its guard finds False"):
            builder.outcomes.observe(HEAD, x)
        monkeypatch.undo()
        with pytest.raises(ExtractorUnsupportedError, match="its guard finds False"):
            builder.outcomes.observe(HEAD, x)


def test_a_plan_for_an_outcome_is_not_replayed_as_a_graph(caplog) -> None:
    """A CUDA graph is refused for it, before anything of CUDA is asked."""
    model = loaded("sign")
    builder = builder_of(model)
    plan = build(builder, model, ("True",))
    with torch.inference_mode():
        same, sizes = builder.prover.record(plan, [1])
    assert same is plan
    assert sizes == []
    assert "branches on tensor values" in caplog.text


def test_the_catalogue_says_how_layers_behind_a_branch_are_served(monkeypatch) -> None:
    """Notes name the branch, and whether compiled plans follow it; EXPORT never does."""
    monkeypatch.setattr(Extractor.EXPORT, "automatic", True)  # As on Python 3.14.
    followed = next(note for note in measure(loaded("sign")).notes if "branches" in note)
    assert "TORCHSCRIPT serves layers from there on by one compiled plan for each way" in followed
    refused = next(note for note in measure(loaded("computed")).notes if "branches" in note)
    assert "TORCHSCRIPT serves no layer from there on" in refused


def test_programs_for_several_outcomes_are_of_one_variant() -> None:
    """What holds for another outcome as well is not taken if it is finished in another way."""
    model = loaded("words", (8,))
    builder = builder_of(model)
    usual, *_ = plans = [
        build(builder, model, outcome, variant=variant)
        for outcome, variant in zip(
            OUTCOMES * 2, ("", CHANNELS_LAST, CHANNELS_LAST, ""), strict=True
        )
    ]
    assert [plan.variant for plan in plans] == ["", CHANNELS_LAST, CHANNELS_LAST, ""]
    assert [plan.built is usual.built for plan in plans] == [True, False, False, True]
