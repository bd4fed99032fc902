"""A sample of ``make test-interventions``: interventions do what plain hooks do, and no more."""

from __future__ import annotations

import intervention_truths
import prove_interventions
import pytest
import torch
from gradient_subjects import GradientSubject, hugging_face
from intervention_cases import SITES, NamedSite, own
from prove_interventions import OPERATIONS, Row, prove, section

import gradnets
from layertap import Intervention
from layertap.intervention import Operation


def net(name: str) -> GradientSubject:
    return next(each for each in own() if each.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("splits", "batch_second")),
    ],
)
def test_interventions_equal_plain_hooks(name: str) -> None:
    """In-place code, second calls, containers and a second batch dimension are all right."""
    row = prove(net(name))
    assert row.error == ""
    assert row.wrong == []
    assert row.refused == {}
    assert row.identical == row.sites >= 7
    assert row.right == dict.fromkeys(OPERATIONS, row.sites)


def test_each_operation_is_requested_by_names_of_axes() -> None:
    """The layers of BERT are changed by tokens, channels and heads, by every operation."""
    row = prove(next(each for each in hugging_face() if each.name == "bert"))
    assert row.error == ""
    assert row.wrong == []
    assert set(row.named) == {each.value for each in Operation}


def test_a_module_that_asks_for_the_same_tensor_has_the_bits_of_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A changed query of nn.MultiheadAttention is no longer its key, so its bits are others."""
    monkeypatch.setattr(
        prove_interventions, "SPREAD", dict.fromkeys(prove_interventions.SPREAD, 99)
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    row = prove(GradientSubject("tiny", "own", gradnets.tiny_vit, (3, 32, 32), images))
    assert row.error == ""
    assert row.wrong == []
    assert row.moved > 0
    assert row.moved + row.identical + sum(row.refused.values()) == row.sites


def test_the_proof_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bits, other numbers in the report and refusals without a true reason are wrong."""
    scaled = OPERATIONS["scale"]

    def other(*given: object) -> prove_interventions.Asked:
        asked = scaled(*given)  # type: ignore[arg-type]
        edit = asked.edit._replace(change=intervention_truths.scale(-0.5000001))
        return asked._replace(edit=edit)

    monkeypatch.setattr(prove_interventions, "OPERATIONS", {**OPERATIONS, "scale": other})
    wrong = prove(net("residual")).wrong
    assert len([line for line in wrong if line.startswith("turn")]) > 10

    monkeypatch.setattr(prove_interventions, "OPERATIONS", {})
    done = intervention_truths.Done.of
    monkeypatch.setattr(
        intervention_truths.Done, "of",
        lambda old, new: done(old, new)._replace(elements=old.numel() + 1),
    )  # fmt: skip
    wrong = prove(net("residual")).wrong
    assert wrong
    assert all("told (1, " in line for line in wrong)


def test_identities_that_change_something_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity that changes the last bit is noticed beside the plain request."""
    identities = dict(prove_interventions.IDENTITIES)

    def almost(site: prove_interventions.Site, *given: object) -> prove_interventions.Asked:
        asked = identities["scale"](site, *given)  # type: ignore[arg-type]
        return asked._replace(intervention=Intervention.scale(site.name, 1.0 + 2**-22))

    monkeypatch.setattr(prove_interventions, "IDENTITIES", {"scale": almost})
    monkeypatch.setattr(prove_interventions, "OPERATIONS", {})
    row = prove(net("residual"))
    assert any("has other bits than without" in line for line in row.wrong)
    assert row.identical == 0


def test_layers_with_hand_named_dimensions_are_of_ten_kinds_of_model() -> None:
    """At least ten models have such layers, and skip, heads and patches are among them."""
    sites: list[NamedSite] = [site for each in SITES.values() for site in each]
    assert len(SITES) >= 10
    assert any(site.skips for site in sites)
    assert any(site.heads for site in sites)
    assert any(site.grid for site in sites)


def test_a_model_that_was_not_compared_is_shown() -> None:
    """The table has the reason in place of numbers."""
    text = section([Row("planted", "torchvision", error="its process ended")])
    assert text.splitlines()[-1].endswith("its process ended |")
