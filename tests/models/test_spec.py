from __future__ import annotations

import pytest

from layertap.errors import ConfigError
from layertap.models import ModelSpec, SourceKind


@pytest.mark.parametrize(
    ("text", "name", "kind", "target"),
    [
        ("resnet18", "resnet18", SourceKind.TORCHVISION, "resnet18"),
        ("torchvision:resnet18", "resnet18", SourceKind.TORCHVISION, "resnet18"),
        ("a-1.b=resnet18", "a-1.b", SourceKind.TORCHVISION, "resnet18"),
        ("nets/my net.pt", "my_net", SourceKind.TORCHSCRIPT, "nets/my net.pt"),
        ("torchscript:nets/x", "x", SourceKind.TORCHSCRIPT, "nets/x"),
        ("nets/run=3/x.pt", "x", SourceKind.TORCHSCRIPT, "nets/run=3/x.pt"),
        ("y=nets/run=3/x.pt", "y", SourceKind.TORCHSCRIPT, "nets/run=3/x.pt"),
        ("./x", "x", SourceKind.TORCHSCRIPT, "./x"),
        ("pkg.nets:tiny", "tiny", SourceKind.FACTORY, "pkg.nets:tiny"),
        ("pkg.nets:Net.make", "Net.make", SourceKind.FACTORY, "pkg.nets:Net.make"),
        ("n=pkg.nets:tiny", "n", SourceKind.FACTORY, "pkg.nets:tiny"),
        ("factory:pkg.nets:tiny", "tiny", SourceKind.FACTORY, "pkg.nets:tiny"),
    ],
)
def test_parse_tells_name_kind_and_target(
    text: str, name: str, kind: SourceKind, target: str
) -> None:
    """Each form of a source is recognised, and gives the model its name."""
    spec = ModelSpec.parse(text)

    assert (spec.name, spec.kind, spec.target) == (name, kind, target)


def test_parse_passes_the_rest_on() -> None:
    """Weights, seed and item shape are kept as given."""
    spec = ModelSpec.parse("resnet18", weights="random", seed=3, item_shape=(3, 32, 32))

    assert (spec.weights, spec.seed, spec.item_shape) == ("random", 3, (3, 32, 32))


def test_specs_are_values() -> None:
    """Equal specs are equal and have equal hashes, so that they can be keys."""
    assert len({ModelSpec.parse("m=resnet18"), ModelSpec("resnet18", name="m")}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model source: got ''"),
        ("torchvision:", "model source"),
        ("x=", "model source"),
        ("=resnet18", "model name: got nothing"),
        ("a b=resnet18", "model name: got 'a b'"),
        ("modèle=resnet18", "model name"),
    ],
)
def test_malformed_texts_are_refused(text: str, message: str) -> None:
    """A malformed name or source is a ConfigError that quotes it."""
    with pytest.raises(ConfigError, match=message):
        ModelSpec.parse(text)


@pytest.mark.parametrize("shape", [(), (3, 0, 8), (-1,)])
def test_item_shapes_are_positive(shape: tuple[int, ...]) -> None:
    """An empty item shape, or one with a size below 1, is refused."""
    with pytest.raises(ConfigError, match="item shape of resnet18"):
        ModelSpec("resnet18", item_shape=shape)


def test_empty_weights_are_refused() -> None:
    """Empty weights are refused instead of being taken as a default."""
    with pytest.raises(ConfigError, match="weights of resnet18"):
        ModelSpec("resnet18", weights="")


@pytest.mark.parametrize("weights", ["DEFAULT", "random"])
def test_a_key_needs_a_checkpoint(weights: str) -> None:
    """A state dict's key has no meaning for weights that are not a file."""
    with pytest.raises(ConfigError, match="weights_key of resnet18: got 'teacher' with weights"):
        ModelSpec("resnet18", weights=weights, weights_key="teacher")
