"""Models that torch.compile was applied to are served as their modules are."""

from __future__ import annotations

import logging

import pytest
import torch

import compilednets
from compilednets import ITEM
from layertap import load
from layertap.models import ModelSpec, load_model
from layertap.models.eager import without_torch_compile

WAYS = {
    "whole": "the model itself",
    "in_place": "the model itself",
    "child": "body",
    "child_in_place": "body",
    "by_forward": "the model itself",
    "by_decorator": "the model itself",
}
"""How torch.compile was applied, and what the log says was compiled."""


@pytest.mark.parametrize("way", WAYS)
def test_no_compiled_code_runs(way, caplog) -> None:
    """Layers have the names and values of the modules, and the log tells what is not compiled."""
    compilednets.ran.clear()
    x = torch.rand(2, *ITEM)
    right = compilednets.plain()
    with (
        caplog.at_level(logging.WARNING),
        load(f"compilednets:{way}", item_shape=ITEM, plan_cache="off") as model,
    ):
        assert set(dict(right.named_modules())) - {""} < set(model.layers)
        # Symbolic tracing looks at the class's forward, and refuses a compiled one.
        for extractor in ("hook",) if way == "by_decorator" else ("hook", "fx"):
            got = model.extract(x, ["body.1", "head"], extractor=extractor)
            assert torch.equal(got["body.1"], right.body[:2](x))
            assert torch.equal(got["head"], right(x))
    assert not compilednets.ran
    assert f"layertap runs {WAYS[way]} without torch.compile" in caplog.text


@pytest.mark.parametrize("net", ["plain", "disabled"])
def test_others_stay_as_they_are(net, caplog) -> None:
    """A forward that torch.compile was told to leave alone is not replaced."""
    module = load_model(ModelSpec(f"compilednets:{net}", item_shape=ITEM)).module
    assert "forward" not in vars(module)
    assert "torch.compile" not in caplog.text


@pytest.mark.parametrize("net", ["by_two_decorators", "hooked"])
def test_what_is_around_torch_compile_stays(net) -> None:
    """Autocast around a compiled forward, and a hook on the compiled model, count as before."""
    x = torch.rand(2, *ITEM)
    made, right = getattr(compilednets, net)(), getattr(compilednets, net)()(x)
    got = without_torch_compile(made)[0](x)
    assert got.dtype == right.dtype
    assert torch.equal(got, right)
    assert not torch.equal(got.float(), compilednets.plain()(x))


def test_what_was_exported_is_loaded(tmp_path) -> None:
    """A model of torch.export can't be put into evaluation mode, and has the mode of its export."""
    x = torch.rand(2, *ITEM)
    net = compilednets.plain()
    batch = {0: torch.export.Dim("items", max=64)}
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=(batch,)), tmp_path / "a.pt2")
    compilednets.exported_file = str(tmp_path / "a.pt2")
    for factory in ("exported", "unflattened"):
        with load(f"compilednets:{factory}", item_shape=ITEM, plan_cache="off") as model:
            got = model.extract(x, "output", extractor="hook")["output"]
            assert torch.equal(got, net(x))
            if factory == "unflattened":
                got = model.extract(x, "body.1", extractor="hook")["body.1"]
                assert torch.equal(got, net.body[:2](x))
            else:
                assert "torch.export.unflatten" in model.layers["head"].refusals["hook"]["output"]
