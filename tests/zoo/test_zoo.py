"""The zoo in short: no answer about an awkward model is wrong. ``make test-zoo`` asks for more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from layertap import Client, Extractor
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server
from zoo import every_specimen
from zoo.drive import SHORT, drive
from zoo.prove_zoo import Row, row_of, table
from zoo.remembering import Pair
from zoo.specimen import Specimen, specimen
from zoo.truth import mistake, truth_of

KNOWN: dict[str, str] = {}
"""Specimens that are not served right yet, and why."""

NOT_COMPARED = {
    "AdvancesGenerator": "stateful: an iterator can't be rewound, and the catalogue says so",
    "GlobalIterator": "stateful likewise",
    "EqualTexts": "two members of one name look like passes that differ, and the catalogue says so",
}
"""Specimens of which no answer can be held against a fresh instance, and why."""


@pytest.fixture(scope="session")
def found() -> dict[str, Row]:
    """Drive the whole zoo by the short grid, each specimen in a process of its own."""
    script = Path(__file__).with_name("prove_zoo.py")
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # Other tests use the other core.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "--grid", "short", "--json", "--jobs", jobs],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    rows = [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.specimen: row for row in rows}


def _cases() -> list[object]:
    marks = {name: pytest.mark.xfail(reason=reason, strict=True) for name, reason in KNOWN.items()}
    return [
        pytest.param(name, marks=[marks[name]] if name in marks else [])
        for name in every_specimen()
    ]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", _cases())
def test_every_answer_is_right_or_refused(name: str, found: dict[str, Row]) -> None:
    """No layer is answered wrongly by any extractor, and nothing that is claimed is refused."""
    row = found[name]
    assert row.wrong == []
    assert row.failed == []
    assert row.late == []
    assert row.answers or row.unloadable or name in NOT_COMPARED


@pytest.mark.long
def test_a_real_server_answers_as_the_engine_does() -> None:
    """Awkward models behind one real server are answered rightly over gRPC, one after the other."""
    names = ("BatchPeak", "NestedTuples", "OverwritesOutputs", "LstmBatchSecond", "OddStrides")
    known = every_specimen()
    engine = Engine(threads=1)
    try:
        for name in names:
            engine.load(ModelSpec(known[name].source, name=name, item_shape=known[name].item))
        with running_server(engine) as address, Client(address) as client:
            for name in names:
                assert _wrong_over_grpc(client, known[name]) == []
    finally:
        engine.close()


def _wrong_over_grpc(client: Client, specimen: Specimen) -> list[str]:
    wrong = []
    for x in specimen.requests[:3]:
        truth = truth_of(specimen.fresh(), x)
        features = client.extract(specimen.name, x.numpy(), "*", extractor=Extractor.HOOK)
        for layer, value in features.items():
            expected = truth.values((layer, "output", 0, ()))
            if expected and mistake(value, expected[0], tolerant=False):
                wrong.append(layer)
        assert len(features)
    return wrong


@specimen("Its second layer's value depends on a global counter that nothing announces")
class Planted(Pair):
    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_the_proof_can_fail() -> None:
    """A model that is served with other weights than the fresh one has is found out."""
    planted: Specimen = Planted.specimen

    class Other(Specimen):
        def fresh(self) -> nn.Module:
            net = Planted.build().eval()
            net.second.bias.data += 0.01
            return net

    row = row_of(planted, drive(Other(**vars(planted)), SHORT), 0.0)
    assert row.wrong
    assert any("HOOK second" in line for line in row.wrong)
    assert not any("first" in line for line in row.wrong)
    assert f"| {len(row.wrong)} |" in table([row])


def test_a_mistake_is_told_from_noise() -> None:
    """Values, shapes, types and the places of NaN must agree; only tolerance lets noise pass."""
    true = torch.tensor([1.0, float("nan"), 3.0])
    right = true.numpy()
    assert mistake(right, true, tolerant=False) == ""
    assert mistake(right + np.float32(1e-5), true, tolerant=False)
    assert mistake(right + np.float32(1e-5), true, tolerant=True) == ""
    assert mistake(right + np.float32(1e-2), true, tolerant=True)
    assert mistake(np.nan_to_num(right), true, tolerant=True)
    assert mistake(right[:2], true, tolerant=True)
    assert mistake(right.astype(np.float64), true, tolerant=True)
