"""A compiled program serves the sizes at which it was proven, whatever it holds of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sizenets
from asking import ask
from kept import kept
from layertap import Extractor, LayerSelection, errors
from layertap.engine import Engine, Limits, ModelHost
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from oracle import outputs_of


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models that keeps few plans."""
    engine = Engine(Limits(plans=4), plan_cache=kept())
    yield engine
    engine.close()


def sample(host: ModelHost, shape: tuple[int, ...], batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + batch)
    if host.model.signature.main.dtype.is_floating_point:
        return 10 * torch.randn(batch, *shape, generator=generator)
    return torch.randint(0, 50, (batch, *shape), generator=generator)


def programs(host: ModelHost) -> int:
    """Return how many compiled programs a host keeps."""
    plans = [*host.plans._built.values(), *host.plans._declared.values()]
    return len({id(plan.built) for plan in plans if plan.kind.compiled})


WAVES = [(40,), (60,), (88,), (20,), (60,)]
IMAGES = [(3, 16, 16), (3, 24, 16), (3, 32, 40), (3, 24, 16)]


@pytest.mark.parametrize(
    ("net", "layer", "shapes", "shared"),
    [
        ("follows", "out", WAVES, True),
        ("encoder", "pooled", [(40,), (60,), (20,)], True),
        ("convolutions", "fixed", [(3, 64, 64), (3, 71, 90), (3, 45, 64)], True),
        ("windows", "out", [(3, 64, 64), (3, 72, 48), (3, 66, 90)], None),
        ("patches", "head", [(3, 64, 96), (3, 72, 48), (3, 66, 90)], None),
        ("baked_half", "out", WAVES, False),
        ("baked_view", "out", WAVES, False),
        ("baked_bias", "out", WAVES, False),
        ("baked_scale", "out", IMAGES, False),
    ],
)
def test_every_size_gets_its_own_values(engine, net, layer, shapes, shared) -> None:
    """Whether a trace follows a size or holds it, TORCHSCRIPT gives what a fresh module does."""
    host = engine.load(ModelSpec(f"sizenets:{net}", item_shape=shapes[0]), [LayerSelection(layer)])
    fresh = getattr(sizenets, net)()
    for shape in shapes:
        for batch in (2, 1, 5):
            x = sample(host, shape, batch)
            (right,) = outputs_of(fresh, x, layer)
            features = ask(engine, net, layer, x, Extractor.TORCHSCRIPT)
            assert features.extractor is Extractor.TORCHSCRIPT
            error = difference(features.torch()[layer], right)
            assert error <= COMPILED_TOLERANCE[torch.float32], (shape, batch)
    if shared is not None:
        assert programs(host) == (1 if shared else len(set(shapes)))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; the trace is the naive way.
def test_a_naive_trace_is_wrong_without_a_word() -> None:
    """The nets above do hold their sizes: one program for all of them gives other values."""
    for net, own, other in (("baked_half", (1, 40), (1, 60)), ("baked_scale", (1, 3, 16, 16),
                                                               (1, 3, 32, 40))):  # fmt: skip
        module = getattr(sizenets, net)()
        naive = torch.jit.trace(module, torch.rand(own), check_trace=False)
        x = torch.arange(torch.Size(other).numel()).float().view(other)
        assert difference(naive(x), module(x)) > 1e-2


@pytest.mark.parametrize("extractor", [Extractor.AUTO, Extractor.TORCHSCRIPT])
def test_a_size_at_which_the_code_looks_at_values(engine, extractor) -> None:
    """The program for short waves would be right on most samples, and wrong for large values."""
    host = engine.load(
        ModelSpec("sizenets:looks_when_long", item_shape=(40,)), [LayerSelection("out")]
    )
    fresh = sizenets.looks_when_long()
    for length in (60, 120, 60, 120):
        for scale in (1, 1e6, 1, 1e6):
            for batch in (2, 1):
                x = scale * sample(host, (length,), batch)
                try:
                    features = ask(engine, "looks_when_long", "out", x, extractor)
                except errors.ExtractorUnsupportedError:
                    assert extractor is Extractor.TORCHSCRIPT, (length, scale, batch)
                    assert length == 120
                    continue
                assert torch.equal(features.torch()["out"], fresh(x)), (length, scale, batch)


def test_programs_for_sizes_stay_few(engine) -> None:
    """A net that holds its size in every program keeps as many as plans may, and answers right."""
    host = engine.load(ModelSpec("sizenets:baked_half", item_shape=(40,)))
    fresh = sizenets.baked_half()
    for length in (*range(20, 34, 2), 20):
        x = sample(host, (length,), 2)
        (right,) = outputs_of(fresh, x, "out")
        features = ask(engine, "baked_half", "out", x, Extractor.TORCHSCRIPT)
        assert difference(features.torch()["out"], right) <= COMPILED_TOLERANCE[torch.float32]
    assert programs(host) <= 4
    assert len(host._measured.builder._portable) <= 5
