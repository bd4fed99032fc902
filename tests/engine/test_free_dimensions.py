"""Models whose input isn't an image: waveforms, token ids and series of any length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import asking
import inputnets
import severalnets
import sizenets
from kept import kept
from layertap import Extractor, errors
from layertap.engine import Engine, Limits
from layertap.extraction import sizes
from layertap.models import LoadedModel, ModelSpec
from oracle import outputs_of

PLANS = 3


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models that keeps few plans."""
    engine = Engine(Limits(plans=PLANS), plan_cache=kept())
    yield engine
    engine.close()


def inputs(kind: str, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    if kind == "text":
        return torch.randint(0, 50, (2, length), generator=generator)
    shape = (2, length, 6) if kind == "series" else (2, length)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    ("net", "item_shape", "layer"),
    [("wave", (64,), "second"), ("text", (16,), "norm"), ("series", (10, 6), "head")],
)
@pytest.mark.parametrize("extractor", [Extractor.AUTO, Extractor.HOOK, Extractor.TORCHSCRIPT])
def test_any_length_is_served(engine, net, item_shape, layer, extractor) -> None:
    """Each length gives the values of a fresh model, and only few plans are kept."""
    host = engine.load(ModelSpec(f"inputnets:{net}", item_shape=item_shape))
    fresh = getattr(inputnets, net)()
    for length in (16, 13, 15, 12, 16, 14, 13):
        x = inputs(net, length)
        (right,) = outputs_of(fresh, x, layer)
        got = asking.ask(engine, net, layer, x.numpy(), extractor)[layer]
        np.testing.assert_allclose(got, right.numpy(), rtol=1e-4, atol=1e-5)
    assert len(host.plans._built) <= PLANS


@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.TORCHSCRIPT])
def test_any_length_of_a_slow_model_is_served(engine, monkeypatch, extractor) -> None:
    """Without expressions, as for a model with slow passes, each length still gives its values."""
    monkeypatch.setattr(sizes, "MAX_SECONDS", 0.0)
    engine.load(ModelSpec("inputnets:wave", item_shape=(64,)))
    fresh = inputnets.wave()
    for length in (64, 48, 57, 48):
        x = inputs("wave", length)
        (right,) = outputs_of(fresh, x, "second")
        got = asking.ask(engine, "wave", "second", x.numpy(), extractor)["second"]
        np.testing.assert_allclose(got, right.numpy(), rtol=1e-4, atol=1e-5)


def test_a_length_that_the_model_refuses_gets_the_models_own_words(engine, caplog) -> None:
    """The caller gets the model's message as an input error; no traceback is logged."""
    engine.load(ModelSpec("inputnets:divisible", item_shape=(3, 16, 16)))
    with pytest.raises(
        errors.InvalidInputError,
        match=r"items of x \[3, 16, 12\] float32: ValueError: the image's size must be "
        r"a multiple of 8, got \[16, 12\]; it was measured at x \[3, 16, 16\]",
    ):
        asking.ask(engine, "divisible", "conv", np.zeros((1, 3, 16, 12), np.float32))
    assert "Traceback" not in caplog.text


def test_layers_of_a_model_that_differentiates(engine) -> None:
    """Values from inside a differentiated part are served without their autograd graph."""
    engine.load(ModelSpec("inputnets:force", item_shape=(5, 3)))
    x = torch.rand(2, 7, 3)
    for layer in ("energy.1", "out"):
        with torch.inference_mode(mode=False), torch.no_grad():
            (right,) = outputs_of(inputnets.force(), x.clone(), layer)
        got = asking.ask(engine, "force", layer, x.numpy(), Extractor.HOOK)[layer]
        np.testing.assert_allclose(got, right.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the batches that models were run on."""
    ran: list[tuple[int, ...]] = []
    forward = LoadedModel.forward

    def counted(self, batch):
        ran.extend(batch.shapes)
        return forward(self, batch)

    monkeypatch.setattr(LoadedModel, "forward", counted)
    return ran


def test_hook_serves_hundreds_of_lengths_with_one_pass_each(engine, passes) -> None:
    """The shapes follow from the catalogue, so a new length costs no measuring and no plan."""
    host = engine.load(ModelSpec("inputnets:wave", item_shape=(400,)))
    fresh = inputnets.wave()
    passes.clear()
    lengths = [*range(30, 330), 4000]
    for length in lengths:
        x = inputs("wave", length)
        (right,) = outputs_of(fresh, x, "second")
        got = asking.ask(engine, "wave", "second", x.numpy(), Extractor.HOOK)["second"]
        assert np.array_equal(got, right.detach().numpy())
    assert passes == [(2, length) for length in lengths]
    assert not host.plans._built


@pytest.mark.parametrize("extractor", [Extractor.AUTO, Extractor.HOOK])
def test_a_size_at_which_the_expression_is_wrong_is_served_right(engine, caplog, extractor) -> None:
    """Code that changes its ways beyond what was measured gives its own values, and a warning."""
    engine.load(ModelSpec("sizenets:thinned", item_shape=(100,)))
    fresh = sizenets.thinned()
    for _ in range(3):
        for length in (90, 900, 901, 90):
            x = inputs("wave", length)
            (right,) = outputs_of(fresh, x, "first")
            got = asking.ask(engine, "thinned", "first", x.numpy(), extractor)["first"]
            assert np.array_equal(got, right.numpy())
    assert (
        "another shape than the catalogue predicts for items of wave [900] float32" in caplog.text
    )


def test_a_size_that_is_refused_within_the_model_is_refused(engine, caplog) -> None:
    """The model's own words reach the caller each time; layers before them are served."""
    engine.load(ModelSpec("sizenets:short_only", item_shape=(100, 6)))
    x = inputs("series", 121).numpy()
    for _ in range(2):
        with pytest.raises(errors.InvalidInputError, match="at most 120 elements, got 121"):
            asking.ask(engine, "short_only", "second", x, Extractor.HOOK)
    assert "Traceback" not in caplog.text
    for layer, length in (("first", 121), ("second", 90)):
        x = inputs("series", length).numpy()
        got = asking.ask(engine, "short_only", layer, x, Extractor.HOOK)[layer]
        assert got.shape == (2, length, 8)


def test_state_that_is_written_at_some_sizes_only(engine) -> None:
    """Each answer is that of a first call, also at a size at which the model begins to remember."""
    engine.load(ModelSpec("sizenets:writes", item_shape=(100,)))
    for length in (90, 800, 90, 800, 800, 90):
        x = inputs("wave", length)
        (right,) = outputs_of(sizenets.writes(), x, "first")
        got = asking.ask(engine, "writes", "first", x.numpy(), Extractor.HOOK)["first"]
        assert np.array_equal(got, right.numpy()), length


def test_a_reply_for_another_length_is_refused_before_any_pass(passes) -> None:
    """The bytes of a reply follow from the expressions too, so the limit holds without a pass."""
    engine = Engine(Limits(reply_bytes=20_000), plan_cache=kept())
    try:
        engine.load(ModelSpec("inputnets:wave", item_shape=(400,)))
        passes.clear()
        with pytest.raises(errors.ReplyTooLargeError, match=r"3\d{4} bytes predicted"):
            asking.ask(engine, "wave", "first", inputs("wave", 4000).numpy(), Extractor.HOOK)
        assert not passes
    finally:
        engine.close()


def test_a_value_that_samples_lack_is_served_at_other_lengths(engine: Engine) -> None:
    """A mask that is passed on only if it hides something; where it is not, the error says so."""
    engine.load(ModelSpec("severalnets:hides_whole_mask"))
    layers = ["pool.mask:input", "pool", "head"]
    fresh = severalnets.hides_whole_mask()
    pooled: list[torch.Tensor] = []
    fresh.pool.register_forward_hook(lambda _, args, output: pooled.append(output.clone()))
    for length in (16, 9, 5, 9):
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        given = {"input_ids": torch.arange(2 * length).view(2, length), "attention_mask": mask}
        right = fresh(**given)
        found = asking.ask(engine, "hides_whole_mask", layers, given, Extractor.HOOK)
        assert np.array_equal(found["pool.mask:input"], mask.float().numpy())
        assert np.array_equal(found["pool"], pooled[-1].detach().numpy())
        assert np.array_equal(found["head"], right.detach().numpy())
        whole = {**given, "attention_mask": torch.ones_like(mask)}
        with pytest.raises(errors.ModelRunError, match="'pool': returned no tensor on this input"):
            asking.ask(engine, "hides_whole_mask", layers, whole, Extractor.HOOK)
