from __future__ import annotations

import pytest
from torchvision import models

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models.torchvision_catalogue import Family, find_builder


def test_every_model_is_served_or_refused_with_a_reason() -> None:
    """Everything that torchvision lists has a family, weights and a reference, or is refused."""
    for name in models.list_models():
        if name.startswith(("raft_", "quantized_")):
            with pytest.raises(ModelLoadError, match="can't be served"):
                find_builder(name)
        else:
            builder = find_builder(name)
            assert builder.member("DEFAULT") is models.get_model_weights(name).DEFAULT
            assert builder.reference() in builder.members.values()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("resnet18", Family.CLASSIFICATION),
        ("fcn_resnet50", Family.SEGMENTATION),
        ("ssd300_vgg16", Family.DETECTION),
        ("r3d_18", Family.VIDEO),
    ],
)
def test_families(name: str, family: Family) -> None:
    """The family depends on where torchvision keeps the builder."""
    assert find_builder(name).family is family


def test_unknown_models_have_close_matches() -> None:
    """A misspelt builder is refused with the closest of torchvision's names."""
    with pytest.raises(ModelLoadError) as caught:
        find_builder("resnet_18")

    assert "torchvision has no such model" in str(caught.value)
    assert "did you mean resnet18" in str(caught.value)


def test_close_matches_can_be_served() -> None:
    """A model that would be refused isn't suggested, however similar its name is."""
    with pytest.raises(ModelLoadError) as caught:
        find_builder("raft_smal")

    assert "raft_small" not in str(caught.value)


def test_optical_flow_is_refused() -> None:
    """RAFT takes two images, and the error says so."""
    with pytest.raises(ModelLoadError, match=r"raft_small.*compares two images"):
        find_builder("raft_small")


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V1"])
def test_members_are_found_by_short_and_full_name(name: str) -> None:
    """A member's name may have its class before it, as ``str`` writes it."""
    assert find_builder("resnet50").member(name) is models.ResNet50_Weights.IMAGENET1K_V1


@pytest.mark.parametrize("name", ["IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1"])
def test_unknown_members_list_those_there_are(name: str) -> None:
    """An unknown member, even another model's, is refused with a list of the model's own."""
    with pytest.raises(WeightsUnavailableError) as caught:
        find_builder("resnet50").member(name)

    assert f"got {name!r}, expected one of DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2," in str(
        caught.value
    )
    assert "did you mean IMAGENET1K_V" in str(caught.value)


def test_published_files_are_recognised_by_name() -> None:
    """A file with the base name of torchvision's own counts as that member."""
    builder = find_builder("resnet50")

    assert builder.published("/data/resnet50-0676ba61.pth") is (
        models.ResNet50_Weights.IMAGENET1K_V1
    )
    assert builder.published("mine.pth") is None
