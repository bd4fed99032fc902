"""A sample of ``make test-gradients``: the gradient of every value equals the reference's."""

from __future__ import annotations

from typing import Any

import prove_gradients
import pytest
import torch
from gradient_subjects import GradientSubject
from gradient_truths import Place, Truth, gradients
from prove_gradients import Row, prove, section

import gradnets


def subject(net: str = "residual") -> GradientSubject:
    images = torch.randn(2, *gradnets.IMAGE, generator=torch.Generator().manual_seed(3))
    return GradientSubject(
        net, "torchvision", lambda: getattr(gradnets, net)().float(), gradnets.IMAGE, images
    )


def test_every_gradient_equals_the_reference() -> None:
    """A net with in-place code and a module of three calls has the reference's gradients."""
    row = prove(subject())
    assert row.error == ""
    assert row.wrong == []
    assert row.refused == {}
    assert row.calls >= 4  # The inputs and outputs of two further calls.
    assert row.right == {"float64": row.values, "float32": row.values}
    assert row.checked == prove_gradients.SAMPLES


def test_layers_without_influence_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer on which the score does not depend is refused, and the table says how many are."""
    monkeypatch.setattr(prove_gradients, "MAX_TERMS", 1)
    row = prove(subject("branches"))
    assert row.error == ""
    assert row.wrong == []
    # The later layer, the side branch and the one without gradients, with some of their inputs.
    assert row.refused["the objective does not depend on it"] >= 3
    assert row.never > 0


def test_the_score_is_made_of_every_result_with_gradients() -> None:
    """With all results in the score only the branch that has no gradients is left without one."""
    row = prove(subject("branches"))
    assert row.error == ""
    assert row.wrong == []
    # Its value, its input, and the member of the result that is this value.
    assert row.refused == {"the objective does not depend on it": 3}


def test_the_proof_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that differs is counted as wrong, and so is a reference that differs."""

    def other(*given: Any) -> Truth:
        truth = gradients(*given)
        known = {p: g * 1.01 for p, g in truth.gradients.items() if g is not None}
        return Truth(truth.result, truth.gradients | known)

    monkeypatch.setattr(prove_gradients, "gradients", other)
    row = prove(subject())
    assert len([line for line in row.wrong if "float64" in line]) > 10
    assert len([line for line in row.wrong if "by differences" in line]) == prove_gradients.SAMPLES
    assert section([row]).splitlines()[-1].endswith(f"| {len(row.wrong)} |")


def test_only_float32_is_given_an_allowance() -> None:
    """A tiny gradient may be off by rounding of the largest in float32, and not in float64."""
    tiny = torch.full((2,), 1e-30)
    for dtype, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        row = Row("planted", "torchvision")
        proof = prove_gradients._Proof(subject(), dtype, row, "cpu")
        value = prove_gradients.Value(
            Place("relu", "output", 0, ()), "relu:gradient", 8, batched=True
        )
        proof._judge(value, (tiny * 2).to(dtype), tiny.to(dtype), largest=1.0)
        assert row.right[name] == row.rounded[name] == (1 if dtype is torch.float32 else 0)
        assert len(row.wrong) == (0 if dtype is torch.float32 else 1)


def test_a_model_that_was_not_compared_is_shown() -> None:
    """The table has the reason in place of numbers."""
    text = section([Row("planted", "torchvision", error="its process ended")])
    assert text.splitlines()[-1].endswith("its process ended |")
