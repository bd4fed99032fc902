"""The catalogue's expressions, compared with the shapes that fresh modules give at other sizes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from layertap.description import Dimension
from layertap.extraction import Catalogue, measure, sizes
from layertap.extraction.points import CapturePoint
from layertap.extraction.trial import tried
from layertap.models import LoadedModel, ModelSpec, free_sizes, load_model
from layertap.selection import Capture

IMAGE, WIDE = (3, 64, 64), (3, 64, 96)


def measured(source: str, item_shape: tuple[int, ...]) -> tuple[LoadedModel, Catalogue]:
    model = tried(load_model(ModelSpec(source, weights="random", item_shape=item_shape)))
    return model, measure(model)


def shapes_of(net: nn.Module, x: torch.Tensor) -> dict[tuple[str, Capture, int], tuple[int, ...]]:
    """Return the shape of every tensor that a module is given or returns, by hooks of torch."""
    seen: dict[tuple[str, Capture, int], tuple[int, ...]] = {}
    calls: Counter[tuple[str, Capture]] = Counter()

    def keep(path: str, side: Capture, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[path, side, calls[path, side]] = tuple(value.shape)
        calls[path, side] += 1

    handles = []
    for path, module in net.named_modules():
        handles += [
            module.register_forward_pre_hook(
                lambda _, args, path=path: keep(path, Capture.INPUT, args[0])
            ),
            module.register_forward_hook(
                lambda _, args, out, path=path: keep(path, Capture.OUTPUT, out)
            ),
        ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return seen


def sample(model: LoadedModel, batch: int, shape: tuple[int, ...]) -> torch.Tensor:
    spec = model.signature.main
    if spec.dtype.is_floating_point:
        return torch.rand(batch, *shape)
    return torch.randint(0, 9, (batch, *shape))


NETS = [
    (
        "sizenets:convolutions",
        IMAGE,
        {
            "padded": "[B, 4, ceil(H/2), ceil(W/2)]",
            "pooled": "[B, 4, ceil(H/4), ceil(W/4)]",
            "bare": "[B, 4, floor((H - 5)/12), floor((W - 5)/12)]",
            "up": "[B, 4, 2*floor((H + 7)/12) - 1, 2*floor((W + 7)/12) - 1]",
            "fixed": "[B, 4, 2, 2]",
        },
        [(3, 64, 64), (3, 71, 90), (3, 65, 66), (3, 200, 113), (3, 44, 301)],
    ),
    (
        "sizenets:unet",
        IMAGE,
        {"down.2": "[B, 4, H/8, W/8]", "up.0": "[B, 4, H/4, W/4]", "up.2": "[B, 4, H, W]"},
        [(3, 72, 64), (3, 32, 200), (3, 248, 40)],
    ),
    (
        "sizenets:rounding_unet",
        IMAGE,
        {"down.2": "[B, 4, ceil(H/8), ceil(W/8)]", "up.0": "[B, 4, ceil(H/4), ceil(W/4)]"},
        [(3, 72, 64), (3, 39, 200), (3, 248, 47)],
    ),
    (
        "sizenets:patches",
        WIDE,
        {
            "stem": "[B, 8, floor(H/8), floor(W/8)]",
            "tokens": "[B, floor(H/8)*floor(W/8) + 1, 8]",
            "head": "[B, 5]",
        },
        [(3, 64, 96), (3, 71, 95), (3, 130, 40)],
    ),
    (
        "sizenets:encoder",
        (32,),
        {
            "embed": "[B, sequence, 8]",
            "layer.self_attn.attention_weights": "[B, 2, sequence, sequence]",
            "flat": "[B, 8*sequence]",
            "pooled": "[B, 3]",
        },
        [(32,), (3,), (17,), (64,)],
    ),
    (
        "sizenets:windows",
        IMAGE,
        {
            "inside": "[floor((H + 6)/8)*floor((W + 6)/8)*B, 16, 8]",
            "out": "[B, floor(H/2), floor(W/2), 8]",
        },
        [(3, 64, 64), (3, 66, 90), (3, 98, 34)],
    ),
    (
        "inputnets:wave",
        (400,),
        {"first": "[B, 4, ceil(samples/4) - 1]", "second": "[B, 4, ceil(samples/4) - 2]"},
        [(400,), (101,), (1003,), (402,)],
    ),
    (
        "layoutnets:batch_second",
        IMAGE,
        {"second": "[floor(H/4)*floor(W/4), B, 8]", "apart": "[floor(H/4)*floor(W/4)*B, 8]"},
        [(3, 64, 64), (3, 71, 45)],
    ),
    ("inputnets:squares", (3, 32, 32), {"conv": "[B, 4, H - 2, H - 2]"}, [(3, 40, 40)]),
    (
        "torchvision_resnet18",
        IMAGE,
        {"layer1": "[B, 64, ceil(H/4), ceil(W/4)]", "layer4": "[B, 512, ceil(H/32), ceil(W/32)]"},
        [(3, 65, 96), (3, 150, 33)],
    ),
]


@pytest.mark.parametrize(("source", "item_shape", "patterns", "others"), NETS)
def test_expressions_are_the_shapes_of_fresh_modules(source, item_shape, patterns, others) -> None:
    """Every layer's shape follows its expression, at sizes and batch sizes that were not used."""
    model, catalogue = measured(source.removeprefix("torchvision_"), item_shape)
    for layer, pattern in patterns.items():
        assert words(catalogue, layer) == pattern
    known = 0
    for shape in others:
        for batch in (1, 3):
            key = model.signature.resized(shape)
            sized = free_sizes(model.signature, key)
            real = shapes_of(model.module, sample(model, batch, shape))
            for point, spec in catalogue.specs.items():
                at = spec.at(sized)
                if (
                    at is None
                    or point.member
                    or (point.path, point.capture, point.call) not in real
                ):
                    continue
                assert at.shape(batch) == real[point.path, point.capture, point.call], (
                    point,
                    shape,
                )
                known += 1
    assert known >= len(others) * 2 * len(patterns)


def words(catalogue: Catalogue, layer: str) -> str:
    """Return the shape of a layer's output as the command line shows it."""
    dims = catalogue.entry(layer).specs[Capture.OUTPUT].dims
    sizes = [
        Dimension(
            dim.size,
            dim.batch,
            expression=str(dim.expression) if dim.expression and dim.expression.terms else "",
            varies=dim.expression is None,
        )
        for dim in dims
    ]
    return f"[{', '.join(map(str, sizes))}]"


def test_a_model_without_free_dimensions_runs_at_no_other_size(monkeypatch) -> None:
    """Nothing is tried where nothing may change, and every size is a constant."""
    monkeypatch.setattr(sizes, "_Survey", None)
    _, catalogue = measured("inputnets:flattened", (3, 16, 16))
    spec = catalogue.entry("conv").specs[Capture.OUTPUT]
    assert [str(dim.expression) for dim in spec.dims] == ["1", "4", "14", "14"]


def test_calls_that_some_lengths_do_not_make_have_no_expression() -> None:
    """The tenth call of a cell is there for ten elements only; the result's length is known."""
    _, catalogue = measured("sizenets:cells", (24, 6))
    assert words(catalogue, "cell_20") == "[1?B, 8?]"
    assert words(catalogue, "out") == "[B, L, 8]"


def test_what_no_form_fits_varies() -> None:
    """A waveform that is cut off, or thinned out, from some length on gets a question mark."""
    _, catalogue = measured("sizenets:clipped", (100,))
    assert words(catalogue, "first") == "[B, 40?]"
    assert words(catalogue, "pairs") == "[B, 100?]"


def test_expressions_that_differ_at_the_last_sizes_are_given_up(monkeypatch) -> None:
    """What was found must hold at two sizes that were not used to find it."""
    real = sizes._Runs.shapes

    def shapes(self, at, batch=1, *, nodes=False):
        found = real(self, at, batch, nodes=nodes)
        if batch == 1 or found is None:
            return found
        wrong = CapturePoint(next(iter(found)).kind, "second", Capture.OUTPUT)
        return {**found, wrong: (batch, 4, 1)}

    monkeypatch.setattr(sizes._Runs, "shapes", shapes)
    _, catalogue = measured("inputnets:wave", (400,))
    assert words(catalogue, "first") == "[B, 4, ceil(samples/4) - 1]"
    assert words(catalogue, "second") == "[B, 4, 98?]"


def test_the_passes_are_few(monkeypatch) -> None:
    """A model is run at most so many times at other sizes, whatever it takes."""
    ran: list[int] = []
    real = sizes._Runs.shapes

    def shapes(self, at, batch=1, *, nodes=False):
        ran.append(batch)
        return real(self, at, batch, nodes=nodes)

    monkeypatch.setattr(sizes._Runs, "shapes", shapes)
    for source, shape in (("sizenets:convolutions", IMAGE), ("inputnets:divisible", (3, 64, 64))):
        ran.clear()
        measured(source, shape)
        assert 8 <= len(ran) <= sizes.MAX_PASSES + 8, source


def test_a_slow_model_runs_at_no_further_size(monkeypatch) -> None:
    """Where a pass takes too long, one is enough to see it, and no dimension has an expression."""
    ran: list[int] = []
    real = sizes._Runs.shapes

    def shapes(self, at, batch=1, *, nodes=False):
        ran.append(batch)
        return real(self, at, batch, nodes=nodes)

    monkeypatch.setattr(sizes._Runs, "shapes", shapes)
    monkeypatch.setattr(sizes, "MAX_SECONDS", 0.0)
    _, catalogue = measured("inputnets:wave", (400,))
    assert ran == [1]
    assert words(catalogue, "second") == "[1?B, 4?, 98?]"


@pytest.mark.parametrize(("held_up", "expected"), [({3}, "[B, 4, "), ({3, 4}, "[1?B, 4?, 98?]")])
def test_a_pass_that_is_held_up_once_is_run_again(
    monkeypatch: pytest.MonkeyPatch, held_up: set[int], expected: str
) -> None:
    """A machine that is busy for a moment does not cost the expressions; a slow model does."""
    clock, ran, real = [0.0], [], sizes.survey_shapes

    def survey(model, x, turn):
        ran.append(x.key)
        clock[0] += 10 * sizes.MAX_SECONDS if len(ran) in held_up else 0.0
        return real(model, x, turn)

    monkeypatch.setattr(sizes, "survey_shapes", survey)
    monkeypatch.setattr(sizes, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    _, catalogue = measured("inputnets:wave", (400,))
    assert ran[2] == ran[3]
    assert words(catalogue, "second").startswith(expected)
    assert ("?" in words(catalogue, "second")) == (len(held_up) > 1)


def test_several_inputs_have_one_name_where_their_sizes_are_one() -> None:
    """Ids and mask share a symbol, and shapes that follow both are given by it."""
    _, catalogue = measured("severalnets:masked", (24,))
    assert words(catalogue, "embed").startswith("[B, sequence, ")
    assert "?" not in words(catalogue, "embed")


def test_sizes_of_two_inputs_are_told_apart() -> None:
    """What was read and what is written have lengths of their own; a layer may follow both."""
    _, catalogue = measured("sizenets:translation", (24,))
    assert words(catalogue, "read") == "[B, sequence, 8]"
    assert words(catalogue, "written") == "[B, decoder_ids_sequence, 8]"
    assert words(catalogue, "scores") == "[B, decoder_ids_sequence, sequence]"
    assert words(catalogue, "both") == "[B, decoder_ids_sequence + sequence, 8]"
