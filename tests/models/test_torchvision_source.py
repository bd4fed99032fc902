from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath

import pytest
import torch
from torch import nn
from torchvision import models

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models import ModelSpec
from layertap.models.torchvision_catalogue import find_builder
from layertap.models.torchvision_source import _options, _options_of, build_torchvision

SQUEEZENET_FILE = PurePath(models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url).name


def random(source: str, **options: object) -> nn.Module:
    """Build a model with random weights, in eval mode."""
    return build_torchvision(ModelSpec(source, weights="random", **options)).module.eval()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules have the same keys with bit-equal values."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_random_weights_depend_on_the_seed_alone() -> None:
    """One seed gives one set of weights, another seed another; the generator is unchanged."""
    before = torch.get_rng_state()
    one = random("squeezenet1_1", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)

    assert same_weights(one, random("squeezenet1_1", seed=3))
    assert not same_weights(one, random("squeezenet1_1", seed=4))


def test_random_weights_are_called_so() -> None:
    """Clients read that the weights are random, and their seed."""
    built = build_torchvision(ModelSpec("squeezenet1_1", weights="random", seed=7))

    assert (built.source, built.weights) == ("torchvision:squeezenet1_1", "random (seed 7)")


@pytest.mark.parametrize("name", ["googlenet", "lraspp_mobilenet_v3_large"])
def test_random_models_run_in_eval(name: str) -> None:
    """Models that need arguments of their own are built without a warning, and run."""
    with torch.inference_mode():
        outcome = random(name)(torch.rand(1, 3, 64, 64))

    assert len(outcome) >= 1


def test_detection_models_take_lists() -> None:
    """A detection model is built without its backbone's weights, and marked as taking lists."""
    built = build_torchvision(ModelSpec("ssdlite320_mobilenet_v3_large", weights="random"))

    assert built.takes_list
    with torch.inference_mode():
        (boxes,) = built.module.eval()([torch.rand(3, 64, 64)])
    assert {"boxes", "scores", "labels"} <= boxes.keys()


@pytest.mark.parametrize(
    "name",
    [
        "densenet121",
        "fcos_resnet50_fpn",
        "fcn_resnet50",
        "inception_v3",
        "keypointrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
        "mvit_v2_s",
        "retinanet_resnet50_fpn",
        "ssd300_vgg16",
    ],
)
def test_models_build_without_weights(name: str, torch_home: Path) -> None:
    """Backbones and heads of all kinds are built without a download or a warning."""
    # On the meta device: the arguments are what is tested, not the numbers.
    builder = find_builder(name)
    with torch.device("meta"):
        module = builder.build(**_options(builder))

    assert isinstance(module, nn.Module)
    assert not list(torch_home.iterdir())


def test_a_vit_is_built_for_its_item_shape() -> None:
    """A ViT with random weights is built for the size of its item shape."""
    built = build_torchvision(ModelSpec("vit_b_32", weights="random", item_shape=(3, 64, 64)))

    assert built.inputs[0].shape == (3, 64, 64)
    with torch.inference_mode():
        assert built.module.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_a_vit_that_cannot_be_built_is_a_load_error() -> None:
    """An image size that patches don't divide gives torchvision's error, in layertap's words."""
    with pytest.raises(ModelLoadError, match="vit_b_32"):
        build_torchvision(ModelSpec("vit_b_32", weights="random", item_shape=(3, 65, 65)))


def test_a_vits_image_size_is_told_from_its_state_dict() -> None:
    """Position embeddings for 1 + 12 x 12 patches of 32 pixels mean an image of 384 pixels."""
    state = {
        "encoder.pos_embedding": torch.zeros(1, 145, 768),
        "conv_proj.weight": torch.zeros(768, 3, 32, 32),
    }

    assert _options_of(find_builder("vit_b_32"), state) == {"image_size": 384}


def test_a_state_dict_file_is_loaded(tmp_path: Path) -> None:
    """The user's file gives the weights, and clients read only its base name."""
    saved = random("squeezenet1_1", seed=5)
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "mine.pth")

    built = build_torchvision(ModelSpec("squeezenet1_1", weights=str(tmp_path / "mine.pth")))

    assert same_weights(built.module, saved)
    assert built.weights == "mine.pth"
    assert str(tmp_path) not in repr(built.source + built.weights)


def test_another_architectures_file_is_refused(tmp_path: Path) -> None:
    """A file of another model is refused with the keys that differ."""
    torch.save(random("squeezenet1_1").state_dict(), tmp_path / "w.pth")

    with pytest.raises(WeightsUnavailableError, match=r"w\.pth don't fit.*missing: .*conv1"):
        build_torchvision(ModelSpec("resnet18", weights=str(tmp_path / "w.pth")))


def test_a_segmentation_files_auxiliary_head_is_seen() -> None:
    """The file's keys show whether there is an auxiliary head."""
    builder = find_builder("fcn_resnet50")

    assert _options(builder)["aux_loss"] is True
    assert _options_of(builder, {"classifier.0.weight": torch.zeros(1)})["aux_loss"] is False
    assert _options_of(builder, {"aux_classifier.0.weight": torch.zeros(1)})["aux_loss"] is True


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_members_load_from_torchs_cache(weights: str, torch_home: Path) -> None:
    """A named member is loaded from torch's cache, by torchvision itself."""
    cached = random("squeezenet1_1", seed=9)
    torch.save(cached.state_dict(), torch_home / SQUEEZENET_FILE)
    before = torch.get_rng_state()

    built = build_torchvision(ModelSpec("squeezenet1_1", weights=weights))

    assert same_weights(built.module, cached)
    assert built.weights == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_cannot_be_downloaded_say_what_to_do(torch_home: Path) -> None:
    """Without a network and a cached file the message has a command; nothing random is made."""
    with pytest.raises(WeightsUnavailableError) as caught:
        build_torchvision(ModelSpec("squeezenet1_1"))

    message = str(caught.value)
    assert message.startswith("weights SqueezeNet1_1_Weights.IMAGENET1K_V1 can't be downloaded (")
    assert f"curl -o {torch_home / SQUEEZENET_FILE} --create-dirs https://" in message
    assert "TORCH_HOME" in message
    assert "--weights PATH" in message
    assert "--weights random" in message


def test_a_download_with_a_wrong_hash_is_refused(
    torch_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose hash differs from torchvision's is refused, and not kept."""
    torch.save(random("squeezenet1_1").state_dict(), tmp_path / SQUEEZENET_FILE)
    published = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(published.value, "url", (tmp_path / SQUEEZENET_FILE).as_uri())

    with pytest.raises(WeightsUnavailableError, match=r"can't be downloaded.*invalid hash value"):
        build_torchvision(ModelSpec("squeezenet1_1"))
    assert not list(torch_home.iterdir())


@pytest.mark.parametrize("cut", [0, 100, -200])
def test_a_broken_cached_file_is_named(cut: int, torch_home: Path) -> None:
    """A damaged file in the cache is named, with the advice to delete it."""
    path = torch_home / SQUEEZENET_FILE
    torch.save(random("squeezenet1_1").state_dict(), path)
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(WeightsUnavailableError, match=r"can't be loaded.*delete it") as caught:
        build_torchvision(ModelSpec("squeezenet1_1"))
    assert str(path) in str(caught.value)


def test_a_published_file_equals_its_member(torch_home: Path) -> None:
    """Googlenet's own file, given as a path, gives exactly the same model as its member."""
    name = PurePath(models.GoogLeNet_Weights.IMAGENET1K_V1.url).name
    trained = models.googlenet(weights=None, aux_logits=True, init_weights=False)
    torch.save(trained.state_dict(), torch_home / name)

    by_member = build_torchvision(ModelSpec("googlenet")).module.eval()
    by_path = build_torchvision(ModelSpec("googlenet", weights=str(torch_home / name)))

    assert same_weights(by_member, by_path.module)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(by_path.module.eval()(x), by_member(x))


@pytest.mark.parametrize("zero", [True, False])
def test_old_detection_files_have_no_epsilon(
    zero: bool, tmp_path: Path, save_detection: Callable[[Path], None]
) -> None:
    """Torchvision's first detection files were trained without the batch norms' epsilon."""
    name = "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth" if zero else "mine.pth"
    save_detection(tmp_path / name)

    module = build_torchvision(
        ModelSpec("fasterrcnn_resnet50_fpn", weights=str(tmp_path / name))
    ).module

    epsilons = {part.eps for part in module.modules() if isinstance(part, nn.BatchNorm2d)}
    assert epsilons == ({0.0} if zero else {1e-5})


@pytest.fixture
def save_detection() -> Callable[[Path], None]:
    """Save a state dict as torchvision's training does, with frozen batch norms."""

    def save(path: Path) -> None:
        state = models.get_model(
            "fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None
        ).state_dict()
        torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)

    return save


def test_the_old_detection_files_are_those_that_torchvision_lists() -> None:
    """The table of files without epsilon lists files that torchvision publishes."""
    from layertap.models.torchvision_source import _ZERO_EPSILON

    for name in _ZERO_EPSILON:
        builder = find_builder(name.partition("_coco-")[0])
        assert builder.published(name) is builder.members["COCO_V1"]
