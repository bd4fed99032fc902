from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from batches import batch_for, images_for
from devices import needs_cuda
from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.extraction.samples import ordinary_batch
from layertap.models import ImageSettings, LoadedModel, ModelSpec, load_model


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """SqueezeNet with seeded weights, on the CPU."""
    return load_model(ModelSpec.parse("small=squeezenet1_1", weights="random"), "cpu")


def test_a_model_is_ready_to_run(model: LoadedModel) -> None:
    """Every module is in eval mode, no parameter needs gradients, the device is a torch.device."""
    assert model.name == "small"
    assert model.device == torch.device("cpu")
    assert not any(part.training for part in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_a_photograph_goes_all_the_way(model: LoadedModel, photo_bytes: bytes) -> None:
    """A JPEG's bytes become an input that the model's signature accepts, and the model runs."""
    assert model.preprocess is not None
    batch = images_for(model.preprocess, photo_bytes, photo_bytes)

    model.signature.main.check(batch.shape, "float32")
    with torch.inference_mode():
        outcome = model.forward(batch_for(model, batch))
    assert outcome.shape == (2, 1000)
    assert torch.allclose(outcome[0], outcome[1], atol=1e-5)


def test_results_depend_on_the_seed_alone(model: LoadedModel, photo_bytes: bytes) -> None:
    """A model loaded again with the same seed gives the same numbers."""
    again = load_model(ModelSpec("squeezenet1_1", weights="random"), torch.device("cpu"))
    assert again.preprocess is not None
    x = images_for(again.preprocess, photo_bytes)

    with torch.inference_mode():
        assert torch.equal(again.forward(batch_for(again, x)), model.forward(batch_for(model, x)))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_a_load_error(device: str) -> None:
    """A device that torch doesn't know or have is named in the message."""
    with pytest.raises(ModelLoadError, match=f"device {device} for model squeezenet1_1: "):
        load_model(ModelSpec("squeezenet1_1", weights="random"), device)


def test_nothing_random_stands_in_for_missing_weights(torch_home: Path) -> None:
    """Missing weights are an error; torch's cache stays empty."""
    with pytest.raises(WeightsUnavailableError):
        load_model(ModelSpec("squeezenet1_1"))
    assert not list(torch_home.iterdir())


def test_each_kind_of_source_has_its_loader(factory_module: Callable[[str], str]) -> None:
    """A factory's module is loaded by the same function as torchvision's models."""
    name = factory_module("from torch import nn\ndef net():\n    return nn.Conv2d(3, 2, 1)\n")

    loaded = load_model(ModelSpec(f"{name}:net", item_shape=(3, 4, 4)))

    with torch.inference_mode():
        assert loaded.forward(ordinary_batch(loaded, 2)).shape == (2, 2, 4, 4)


@needs_cuda
def test_a_model_moves_to_the_gpu() -> None:
    """On a GPU the device has its index, and every parameter is on it."""
    model = load_model(ModelSpec("squeezenet1_1", weights="random"), "cuda")

    assert model.device == torch.device("cuda", torch.cuda.current_device())
    assert {parameter.device for parameter in model.module.parameters()} == {model.device}


def test_assumed_preprocessing_is_warned_of() -> None:
    """For a factory that says nothing about images the assumptions are logged."""
    assumed = load_model(ModelSpec("tinynets:residual", item_shape=(3, 8, 8)))
    known = load_model(ModelSpec("squeezenet1_1", weights="random"))

    assert "says image_mean, image_std" in assumed.assumptions()
    assert known.assumptions() == ""
    assert known.preprocess is not None
    assert known.preprocess.origin == "torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1"


def test_the_crop_that_is_set_is_the_default_item() -> None:
    """Layers are measured at the size of preprocessed images, unless an item shape is given."""
    images = ImageSettings(crop=(48, 40))

    cropped = load_model(ModelSpec("tinynets:residual", images=images))
    other = load_model(ModelSpec("tinynets:residual", images=images, item_shape=(3, 8, 8)))

    assert cropped.signature.main.shape == (3, 48, 40)
    assert other.signature.main.shape == (3, 8, 8)
    assert other.preprocess is not None
    assert other.preprocess.shape == (3, 48, 40)


def hugging_face_folder(folder: Path, module: nn.Module) -> None:
    """Write a module's weights and an image processor's configuration, as Hugging Face does."""
    safetensors.torch.save_file(module.state_dict(), folder / "model.safetensors")
    config = {
        "do_resize": True,
        "size": {"height": 48, "width": 48},
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def test_the_configuration_beside_the_weights_is_followed(
    tmp_path: Path, photo: Image.Image, factory_module: Callable[[str], str]
) -> None:
    """It is used, unless the factory or the settings say otherwise."""
    name = factory_module(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 2, 3))\n"
        "def own():\n    return net()\n"
        "own.preprocess = {'mean': [0.1], 'std': [0.1], 'resize': [32, 32]}\n"
    )
    hugging_face_folder(tmp_path, nn.Sequential(nn.Conv2d(3, 2, 3)))
    folder = str(tmp_path)

    followed = load_model(ModelSpec(f"{name}:net", weights=folder))
    of_code = load_model(ModelSpec(f"{name}:own", weights=folder))
    of_owner = load_model(
        ModelSpec(f"{name}:net", weights=folder, images=ImageSettings(mean=(0.0,), std=(1.0,)))
    )

    def reference(side: int, mean: float, std: float) -> torch.Tensor:
        return transforms.Compose(
            [
                transforms.Resize((side, side)),
                transforms.ToTensor(),
                transforms.Normalize([mean] * 3, [std] * 3),
            ]
        )(photo)

    for model, expected in (
        (followed, reference(48, 0.5, 0.25)),
        (of_code, reference(32, 0.1, 0.1)),
        (of_owner, reference(48, 0, 1)),
    ):
        assert model.preprocess is not None
        assert torch.equal(model.preprocess(photo), expected)
    assert followed.signature.main.shape == (3, 48, 48)
    assert followed.weights == tmp_path.name
    assert followed.preprocess is not None
    assert followed.preprocess.origin == "the checkpoint's preprocessor_config.json"


def test_a_configuration_of_colours_fits_a_model_of_one_channel(
    factory_module: Callable[[str], str], photo: Image.Image
) -> None:
    """timm's configuration says three channels, even if the model was built for another number."""
    name = factory_module(
        "import timm\ndef net():\n    return timm.create_model('resnet10t', in_chans=1)\n"
    )

    model = load_model(ModelSpec(f"{name}:net"))

    assert model.signature.main.shape == (1, 176, 176)
    assert model.preprocess is not None
    assert model.preprocess.assumed == ("image_mean", "image_std")
    assert model.preprocess(photo.convert("L")).shape == (1, 176, 176)
