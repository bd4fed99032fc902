"""timm's models load with timm's transforms; errors say what to do."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from batches import batch_for
from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models import ModelSpec, load_model


def test_a_model_loads_with_timms_transform(photo: Image.Image) -> None:
    """A photo gets the same tensor as from timm's own evaluation transform."""
    model = load_model(ModelSpec.parse("timm:resnet18", weights="random"))
    assert (model.name, model.source) == ("resnet18", "timm:resnet18")
    config = timm.data.resolve_data_config({}, model=model.module)
    expected = timm.data.create_transform(**config, is_training=False)(photo)
    assert model.preprocess is not None
    assert torch.equal(model.preprocess(photo), expected)
    assert "center crop 224" in model.preprocess.describe()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "normalize mean [0.5, 0.5, 0.5] std [0.5, 0.5, 0.5]"),
        ("efficientvit_b0", "resize 235 (bicubic, antialias), center crop 224"),
    ],
)
def test_each_models_own_configuration_counts(name: str, words: str, photo: Image.Image) -> None:
    """Mean, size and interpolation are those of the model's pretrained configuration."""
    model = load_model(ModelSpec(f"timm:{name}", weights="random"))
    config = timm.data.resolve_data_config({}, model=model.module)
    expected = timm.data.create_transform(**config, is_training=False)(photo)

    assert model.preprocess is not None
    assert torch.equal(model.preprocess(photo), expected)
    assert words in model.preprocess.describe()
    assert model.preprocess.origin == "timm's configuration"
    assert model.preprocess.assumed == ()


def test_random_weights_depend_on_the_seed(photo: Image.Image) -> None:
    """The same seed gives the same model, another seed another model."""
    spec = "timm:mobilenetv3_small_050"
    one, again = (load_model(ModelSpec(spec, weights="random", seed=1)) for _ in range(2))
    other = load_model(ModelSpec(spec, weights="random", seed=2))
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(one.forward(batch_for(one, x)), again.forward(batch_for(again, x)))
    assert not torch.equal(one.forward(batch_for(one, x)), other.forward(batch_for(other, x)))


def test_a_state_dict_is_loaded(tmp_path: Path) -> None:
    """The file's values are in the model, described by the file's base name."""
    made = timm.create_model("resnet10t", pretrained=False).eval()
    torch.save(made.state_dict(), tmp_path / "mine.pth")
    model = load_model(ModelSpec("timm:resnet10t", weights=str(tmp_path / "mine.pth")))
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.forward(batch_for(model, x)), made(x))
    assert model.weights == "mine.pth"


def test_a_fixed_size_follows_the_item_shape() -> None:
    """A ViT is built for the requested size, and takes no other."""
    spec = ModelSpec("timm:vit_tiny_patch16_224", weights="random", item_shape=(3, 64, 64))
    model = load_model(spec)
    assert model.signature.main.free == ()
    assert model.forward(batch_for(model, torch.rand(1, 3, 64, 64))).shape == (1, 1000)


def test_an_unknown_name_gets_close_matches() -> None:
    """The error for a misspelt name suggests similar names."""
    with pytest.raises(ModelLoadError, match="resnet18"):
        load_model(ModelSpec("timm:resnet_18", weights="random"))


def test_weights_out_of_reach_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hub the default weights are an error, and random ones don't replace them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match="--weights PATH"):
        load_model(ModelSpec("timm:resnet18"))


def test_a_name_of_weights_is_refused() -> None:
    """timm's weights are part of the model's name."""
    with pytest.raises(WeightsUnavailableError, match="timm names its weights in the model"):
        load_model(ModelSpec("timm:resnet18", weights="IMAGENET1K_V1"))


def test_a_training_checkpoint_is_read_as_timm_reads_it(tmp_path: Path, photo: Image.Image) -> None:
    """Its EMA weights are loaded; images are preprocessed by the training script's arguments."""
    raw, averaged = (timm.create_model("resnet10t", num_classes=1000) for _ in range(2))
    arguments = {"mean": [0.5, 0.4, 0.3], "std": None, "img_size": 96, "crop_pct": 1.0, "lr": 0.1}
    file = tmp_path / "last.pth.tar"
    torch.save(
        {
            "state_dict": raw.state_dict(),
            "state_dict_ema": averaged.state_dict(),
            "args": argparse.Namespace(**arguments),
        },
        file,
    )
    reference = timm.create_model("resnet10t").eval()
    reference.load_state_dict(averaged.state_dict())
    config = timm.data.resolve_data_config(arguments, model=reference)
    expected = timm.data.create_transform(**config, is_training=False)(photo)

    model = load_model(ModelSpec("timm:resnet10t", weights=str(file)))

    assert model.weights == "last.pth.tar: state_dict_ema"
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.forward(batch_for(model, x)), reference(x))
    assert model.signature.main.shape == (3, 96, 96)
    assert model.preprocess is not None
    assert torch.equal(model.preprocess(photo), expected)


def test_a_model_can_be_built_for_one_channel(photo: Image.Image) -> None:
    """An item shape with one channel builds the model for it; the colours' mean is dropped."""
    model = load_model(ModelSpec("timm:resnet10t", weights="random", item_shape=(1, 64, 64)))

    assert model.forward(batch_for(model, torch.rand(1, 1, 64, 64))).shape == (1, 1000)
    assert model.preprocess is not None
    assert model.preprocess.assumed == ("image_mean", "image_std")
    assert model.preprocess(photo.convert("L")).shape == (1, 64, 64)
