from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models import ModelSpec
from layertap.models.factory_source import build_factory

Write = Callable[[str], str]

NETS = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

class Nets:
    small = staticmethod(tiny)

def ones():
    net = tiny()
    nn.init.ones_(net[0].weight)
    return net

def broken():
    raise KeyError("inside")

def number():
    return 3

setting = 4
"""


def test_the_factorys_own_weights_stay(factory_module: Write) -> None:
    """By default the module stays as the factory returned it."""
    name = factory_module(NETS)

    built = build_factory(ModelSpec(f"{name}:ones"))

    assert torch.equal(built.module[0].weight, torch.ones(4, 3, 3, 3))
    assert (built.source, built.weights) == (f"{name}:ones", "factory's own")
    assert built.preprocess is None


PREPROCESSED = """
from torch import nn
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3))

def chain():
    return net()
chain.preprocess = ImageClassification(
    crop_size=48, resize_size=50, mean=(0.5,) * 3, std=(0.2,) * 3
)

def own():
    return net()
own.preprocess = lambda image: functional.to_tensor(image.resize((224, 224))) - 0.5

def settings():
    return net()
settings.preprocess = {"mean": [0.5], "std": [0.25], "resize": [60, 60], "interpolation": "bicubic"}

def misspelt():
    return net()
misspelt.preprocess = {"means": [0.5]}

def unfit():
    return net()
unfit.preprocess = {"std": [0.0]}

def number():
    return net()
number.preprocess = 3

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3))

    def preprocess(self, x):
        raise AssertionError("it takes tensors, as segment-anything's does")

class Described(nn.Conv2d):
    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 96, 96)}

    def __init__(self):
        super().__init__(3, 4, 3)
"""


def test_the_factorys_preprocess_is_taken(factory_module: Write, photo: Image.Image) -> None:
    """A function or a dict of settings on the factory determines how images are preprocessed."""
    name = factory_module(PREPROCESSED)
    reference = transforms.Compose(
        [
            transforms.Resize((60, 60), InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    expected = {
        "chain": ImageClassification(crop_size=48, resize_size=50, mean=(0.5,) * 3, std=(0.2,) * 3)(
            photo
        ),
        "own": transforms.functional.to_tensor(photo.resize((224, 224))) - 0.5,
        "settings": reference(photo),
    }

    for function, tensor in expected.items():
        built = build_factory(ModelSpec(f"{name}:{function}"))
        assert built.preprocess is not None
        assert torch.equal(built.preprocess(photo), tensor), function
        assert built.preprocess.origin == f"the preprocess of {name}:{function}"
        assert built.preprocess_is_code
    assert build_factory(ModelSpec(f"{name}:chain")).inputs[0].shape == (3, 48, 48)
    assert build_factory(ModelSpec(f"{name}:settings")).preprocess.assumed == ()  # type: ignore[union-attr]


def test_a_modules_own_configuration_is_taken(factory_module: Write) -> None:
    """A module's pretrained_cfg, as in timm, gives the preprocessing and the item's size."""
    built = build_factory(ModelSpec(f"{factory_module(PREPROCESSED)}:Described"))

    assert built.inputs[0].shape == (3, 96, 96)
    assert built.preprocess is not None
    assert built.preprocess.origin == "the model's pretrained_cfg"


def test_a_method_of_a_class_is_no_preprocess(factory_module: Write) -> None:
    """A class's method ``preprocess`` needs an instance, so it is ignored."""
    built = build_factory(ModelSpec(f"{factory_module(PREPROCESSED)}:Net"))

    assert built.preprocess is None
    assert not built.preprocess_is_code


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("misspelt", "its preprocess has 'means', expected mean, std, resize"),
        ("unfit", r"its preprocess: image_std: got \[0.0\]"),
        ("number", "its preprocess is a int, expected a function from a PIL image"),
    ],
)
def test_a_bad_preprocess_is_a_load_error(
    function: str, message: str, factory_module: Write
) -> None:
    """What is neither a function nor known settings is an error; no assumption replaces it."""
    with pytest.raises(ModelLoadError, match=message):
        build_factory(ModelSpec(f"{factory_module(PREPROCESSED)}:{function}"))


def test_a_factory_may_be_an_attribute(factory_module: Write) -> None:
    """Dots after the colon lead to attributes of classes."""
    assert isinstance(
        build_factory(ModelSpec(f"{factory_module(NETS)}:Nets.small")).module, nn.Sequential
    )


def test_random_seeds_the_construction(factory_module: Write) -> None:
    """The same seed gives the same module, and the process's generator is unchanged."""
    name = factory_module(NETS)
    before = torch.get_rng_state()

    built = [
        build_factory(ModelSpec(f"{name}:tiny", weights="random", seed=seed)) for seed in (1, 1, 2)
    ]

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(built[0].module[0].weight, built[1].module[0].weight)
    assert not torch.equal(built[0].module[0].weight, built[2].module[0].weight)
    assert built[2].weights == "random (seed 2)"


def test_a_state_dict_is_loaded(factory_module: Write, tmp_path: Path) -> None:
    """A weights file is loaded into the factory's module."""
    name = factory_module(NETS)
    state = build_factory(ModelSpec(f"{name}:ones")).module.state_dict()
    torch.save(state, tmp_path / "w.pth")

    built = build_factory(ModelSpec(f"{name}:tiny", weights=str(tmp_path / "w.pth")))

    assert torch.equal(built.module[0].weight, torch.ones(4, 3, 3, 3))
    assert built.weights == "w.pth"


def test_named_weights_are_refused(factory_module: Write) -> None:
    """A factory has no weights by name."""
    with pytest.raises(WeightsUnavailableError, match="got 'IMAGENET1K_V1', expected DEFAULT"):
        build_factory(ModelSpec(f"{factory_module(NETS)}:tiny", weights="IMAGENET1K_V1"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "it raised KeyError: 'inside'"),
        ("number", r"it returned int, expected a torch\.nn\.Module"),
        ("setting", "has no function 'setting'"),
        ("missing", "has no function 'missing'"),
        ("Nets.missing", r"has no function 'Nets\.missing'"),
    ],
)
def test_bad_factories_are_load_errors(function: str, message: str, factory_module: Write) -> None:
    """Any fault of a factory is a ModelLoadError that names it."""
    with pytest.raises(ModelLoadError, match=message):
        build_factory(ModelSpec(f"{factory_module(NETS)}:{function}"))


def test_a_missing_package_is_a_load_error() -> None:
    """The error names the missing module and says where it was searched."""
    with pytest.raises(ModelLoadError, match=r"no_such_nets.*PYTHONPATH"):
        build_factory(ModelSpec("no_such_nets:tiny"))


def test_a_package_that_breaks_on_import_is_a_load_error(factory_module: Write) -> None:
    """An exception during the import is a ModelLoadError that names its class."""
    with pytest.raises(ModelLoadError, match="importing it raised ZeroDivisionError"):
        build_factory(ModelSpec(f"{factory_module('1 / 0')}:tiny"))


@pytest.mark.parametrize("target", ["pkg:", "factory:pkg"])
def test_half_a_target_is_a_load_error(target: str) -> None:
    """A factory needs a module and a function."""
    with pytest.raises(ModelLoadError, match=r"expected package\.module:function"):
        build_factory(ModelSpec(target, name="x"))


def test_a_lazy_module_is_refused(factory_module: Write) -> None:
    """Its weights would be created at its first input: without the seed, and after loading."""
    name = factory_module("from torch import nn\n\ndef lazy():\n    return nn.LazyConv2d(4, 3)\n")
    with pytest.raises(ModelLoadError, match=r"'weight' has no shape yet.* run the module once"):
        build_factory(ModelSpec(f"{name}:lazy", item_shape=(3, 8, 8)))
