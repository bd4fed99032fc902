"""Requests that name how the program of their extractor is finished."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import guardnets
import tinynets
from asking import ask
from kept import kept
from layertap import Extractor, errors
from layertap.engine import Engine
from layertap.engine.contest import Entrant
from layertap.engine.describe import describe
from layertap.extraction.kinds.torchscript import CHANNELS_LAST
from layertap.extraction.plan import Plan
from layertap.models import Batch, ModelSpec
from oracle import outputs_of
from tinynets import ITEM

TORCHSCRIPT = Extractor.TORCHSCRIPT
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
IMAGE = (3, 6, 6)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with two nets, of which one has branches."""
    engine = Engine(threads=1, plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("guardnets:sign", item_shape=IMAGE))
    yield engine
    engine.close()


def plan_of(engine: Engine, net: str, entrant: Entrant) -> Plan:
    """Return the only plan of a net that an entrant runs."""
    (plan,) = (
        plan
        for key, plan in engine.host(net).plans.built().items()
        if Entrant.of(key) == entrant and plan.points[0].path in {"layer1", "layer2"}
    )
    return plan


def has_channels_last(plan: Plan, x: torch.Tensor) -> bool:
    """Return whether a plan's program returns its value with channels last."""
    found: list[bool] = []

    def sink(index: int, value: torch.Tensor) -> None:
        dense = value.is_contiguous()
        found.append(not dense and value.is_contiguous(memory_format=torch.channels_last))

    plan.built.run(Batch({plan.batch_key.main.name: x}), sink)
    return all(found)


@torch.inference_mode()
def test_the_named_variant_serves(engine: Engine) -> None:
    """The reply names it, its values are right, and its program is the one that was named."""
    x = torch.rand(3, *ITEM)
    expected = outputs_of(tinynets.residual(), x, "layer2")[0]
    for variant in ("", CHANNELS_LAST):
        features = ask(engine, "residual", "layer2", x, TORCHSCRIPT, variant=variant)
        assert (features.extractor, features.variant) == (TORCHSCRIPT, variant)
        torch.testing.assert_close(features.torch()["layer2"], expected, **TOLERANCE)
        plan = plan_of(engine, "residual", Entrant(TORCHSCRIPT, variant))
        assert has_channels_last(plan, x) == bool(variant)


@pytest.mark.parametrize(
    ("extractor", "variant", "message"),
    [
        (Extractor.AUTO, CHANNELS_LAST, "variant: got 'channels_last' with AUTO, which chooses"),
        (Extractor.HOOK, CHANNELS_LAST, "variant: got 'channels_last', expected none for HOOK on"),
        (TORCHSCRIPT, "sideways", "got 'sideways', expected none or 'channels_last' for TORCHSC"),
    ],
)
def test_a_variant_that_there_is_not_is_refused(
    engine: Engine, extractor: Extractor, variant: str, message: str
) -> None:
    """The error says what could have been named."""
    with pytest.raises(errors.InvalidInputError, match=message):
        ask(engine, "residual", "layer2", torch.rand(1, *ITEM), extractor, variant=variant)


def test_the_description_lists_them(engine: Engine) -> None:
    """Without extractors that have none."""
    assert describe(engine.host("residual")).variants == {TORCHSCRIPT: (CHANNELS_LAST,)}


@torch.inference_mode()
def test_each_branch_has_the_variant(engine: Engine) -> None:
    """A program for one outcome of a look at values is finished as named, too."""
    for sign in (1, -1, 1):
        x = sign * torch.rand(2, *IMAGE)
        for variant in (CHANNELS_LAST, ""):
            features = ask(engine, "sign", "head", x, TORCHSCRIPT, variant=variant)
            assert (features.extractor, features.variant) == (TORCHSCRIPT, variant)
            expected = outputs_of(guardnets.sign(), x, "head")[0]
            torch.testing.assert_close(features.torch()["head"], expected, **TOLERANCE)
    keys = [key for key in engine.host("sign").plans.built() if key.extractor is TORCHSCRIPT]
    assert {(key.outcome, key.variant) for key in keys} == {
        (outcome, variant) for outcome in (("True",), ("False",)) for variant in (CHANNELS_LAST, "")
    }


def test_a_variant_takes_no_nan(engine: Engine) -> None:
    """It is refused as it is in the usual way."""
    x = torch.full((1, *ITEM), np.nan)
    with pytest.raises(errors.ExtractorUnsupportedError, match="TORCHSCRIPT can't serve an input"):
        ask(engine, "residual", "layer2", x, TORCHSCRIPT, variant=CHANNELS_LAST)
