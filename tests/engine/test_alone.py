"""Requests with operands of their own share no pass, however alike they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from asking import request_for
from kept import kept
from layertap import Extractor
from layertap.batching import BatchPolicy
from layertap.engine import Call, Engine, ExtractionRequest, HostOptions
from layertap.intervention import parse_interventions
from layertap.models import ModelSpec
from layertap.objective import parse_objective
from tinynets import ITEM
from together import Together

OPERANDS = {
    "nothing": {},
    "interventions": {"interventions": parse_interventions("conv1:zero")},
    "an objective": {"objective": parse_objective("fc[0]")},
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine whose requests may share passes."""
    engine = Engine(plan_cache=kept())
    options = HostOptions(batching=BatchPolicy(max_size=8))
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM), options=options)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", OPERANDS)
def test_only_requests_without_operands_share_a_pass(engine: Engine, name: str) -> None:
    """The numbers of one request must not reach another one's items."""
    layer = "conv1:gradient" if name == "an objective" else "fc"
    x = torch.ones(1, *ITEM)
    request: ExtractionRequest[bytes] = replace(
        request_for("residual", layer, x, Extractor.HOOK),
        **OPERANDS[name],  # type: ignore[arg-type]
    )
    engine.extract(request, Call())  # Now its plan is there.
    together = Together(engine, [lambda: engine.extract(request, Call())] * 2)
    assert together.shared == ([2, 2] if name == "nothing" else [1, 1])
