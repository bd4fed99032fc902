"""Linear layers of a compiled program have weights in oneDNN's layout."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from layertap.extraction import CapturePoint, PlanBuilder, PointKind, Taps, measure, packed_linears
from layertap.extraction.kinds.torchscript import _in_unit_of_its_own
from layertap.extraction.packed_linears import pack_linears
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import PassScope
from layertap.extraction.trial import tried
from layertap.models import ModelSpec, load_model
from layertap.selection import Extractor
from layertap.silence import warnings_ignored


class Mixed(nn.Module):
    """Linear layers with and without a bias, one of which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24, bias=False)
        self.pooled = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = self.first(x)
        b = self.second(nn.functional.gelu(a))
        c = self.second(self.first(b.transpose(1, 2).contiguous().transpose(1, 2)))
        return a, b, c, self.pooled(c[:, 0])


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


TOKENS = 10


def batch(items: int, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(items, tokens, 24, dtype=dtype)


def frozen(net: nn.Module, x: torch.Tensor | None = None) -> torch.jit.ScriptModule:
    with warnings_ignored():
        traced = torch.jit.trace(net, batch(2) if x is None else x, check_trace=False)
        # In the compilation unit that all traces share, constants live as long as the process.
        own = _in_unit_of_its_own(traced.eval(), torch.device("cpu"))
        return torch.jit.freeze(own)  # type: ignore[no-any-return]


def packed(program: torch.jit.ScriptModule, x: torch.Tensor) -> list[torch.Tensor]:
    return pack_linears(program, {"x": x})


def kinds(program: torch.jit.ScriptModule) -> list[str]:
    return [node.kind() for node in program.graph.nodes()]


@torch.inference_mode()
def test_values_are_those_of_the_model(net) -> None:
    """Layers with enough rows are packed; values are the model's for every number of rows."""
    program = frozen(net)
    assert len(packed(program, batch(1))) == 2  # Two layers run twice; one has one row.
    assert kinds(program).count("mkl::_mkl_linear") == 4
    assert kinds(program).count("aten::linear") == 1
    with warnings_ignored():
        optimised = torch.jit.optimize_for_inference(program)
    for served in (program, optimised):
        for items, tokens in ((1, TOKENS), (2, TOKENS), (5, TOKENS), (2, 5), (1, 3)):
            x = batch(items, tokens)
            for value, right in zip(served(x), net(x), strict=True):
                assert torch.allclose(value, right, atol=1e-5)


@torch.inference_mode()
def test_packed_weights_are_really_used(net, monkeypatch) -> None:
    """The test above can fail: with other packed weights, as many rows give other values."""
    true = packed_linears._packed_for
    monkeypatch.setattr(
        packed_linears,
        "_packed_for",
        lambda keys: true({k: torch.rand_like(keys[k]) for k in keys}),
    )
    program = frozen(net)
    kept = packed(program, batch(1))
    for items, right in ((1, False), (2, True)):
        x = batch(items)
        assert torch.allclose(program(x)[0], net(x)[0], atol=1e-2) is right
    del kept


@torch.inference_mode()
def test_rows_of_another_size_are_an_error(net) -> None:
    """As many rows of another size are refused, as torch's own operation does."""
    program = frozen(net)
    assert packed(program, batch(1))
    for size in (1, 12, 23, 25, 240):
        with pytest.raises(RuntimeError):
            program(torch.rand(1, TOKENS, size))


@torch.inference_mode()
def test_programs_of_one_model_share_packed_weights(net) -> None:
    """The second program packs nothing, and the last one that ends frees the packed weights."""
    first, second, other = frozen(net), frozen(net), frozen(net)
    mine, same, unlike = packed(first, batch(1)), packed(second, batch(1)), packed(other, batch(2))
    assert {id(each) for each in mine} == {id(each) for each in same}
    assert {id(each) for each in mine}.isdisjoint(map(id, unlike))  # It has twice as many rows.
    alive = [weakref.ref(each) for each in mine]
    del first, mine
    gc.collect()
    assert all(each() is not None for each in alive)
    del second, same
    gc.collect()
    assert all(each() is None for each in alive)


@torch.inference_mode()
def test_what_can_not_be_packed_stays_as_it_is(net, monkeypatch) -> None:
    """Other types, and weights that would take more memory than the limit, are left to torch."""
    x = batch(1, dtype=torch.float64)
    double = frozen(net.double(), x)
    assert packed(double, x) == []
    assert kinds(double).count("aten::linear") == 5
    net.float()
    held = list(packed_linears._packed)
    limit = sum(key.nbytes for key in held) + 2 * 4 * 40 * 24
    monkeypatch.setattr(packed_linears, "MAX_PACKED_BYTES", limit - 1)
    large = frozen(net)
    assert packed(large, batch(1)) == []
    assert kinds(large).count("aten::linear") == 5
    monkeypatch.setattr(packed_linears, "MAX_PACKED_BYTES", limit)
    assert len(packed(large, batch(1))) == 2


@torch.inference_mode()
def test_freed_weights_are_not_taken_for_later_ones() -> None:
    """Weights at an address that freed weights had are packed again, not taken for those."""
    kept: list[torch.Tensor] = []  # Packed weights may live longer than the weights.
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64)).eval()
        x = torch.randn(16, 64)
        program = frozen(net, x)
        kept += packed(program, x)
        assert torch.allclose(program(x), net(x), atol=1e-5)
        del net, program
    assert len(kept) == 20


@torch.inference_mode()
def test_the_plans_of_two_outcomes_share_packed_weights() -> None:
    """Compiled plans are packed for one item, and those of one model pack its weights once."""
    model = load_model(ModelSpec("guardnets:plain_words", item_shape=(8,)))
    model = tried(model, PassScope(model.module))
    builder = PlanBuilder(model, Taps(model.module), measure(model))
    spec = PassSpec((CapturePoint(PointKind.MODULE, "head"),))
    key = model.signature.key
    one, two = (
        builder.build(Extractor.TORCHSCRIPT, spec, key, (outcome,)).built._packed  # type: ignore[attr-defined]
        for outcome in ("True", "False")
    )
    assert len(one) == 2
    assert {id(each) for each in one} == {id(each) for each in two}
