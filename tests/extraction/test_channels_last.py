"""The convolutions of a compiled program have weights with channels last."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction import CapturePoint, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.channels_last import lay_out_channels_last
from layertap.extraction.kinds.torchscript import CHANNELS_LAST, _in_unit_of_its_own
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.passes import PassScope
from layertap.extraction.plan import Plan, PlanKey
from layertap.extraction.trial import tried
from layertap.models import ModelSpec, load_model
from layertap.selection import Extractor
from layertap.silence import warnings_ignored

CHANNELS = 8
SIDE = 12


class Twice(nn.Module):
    """Runs one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x).relu())


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "usual": lambda: nn.Conv2d(CHANNELS, 16, 3, padding=1),
    "no bias, strided, dilated": lambda: nn.Conv2d(CHANNELS, 16, 3, 2, 2, 2, bias=False),
    "padded by name": lambda: nn.Conv2d(CHANNELS, 16, (3, 5), padding="same"),
    "reflected": lambda: nn.Conv2d(CHANNELS, 16, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(CHANNELS, 16, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS),
    "of one pixel": lambda: nn.Conv2d(CHANNELS, 16, 1),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 16, 3, stride=2),
    "twice": Twice,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CONVOLUTIONS[name]().eval()


def image(items: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(items, CHANNELS, SIDE, SIDE, dtype=dtype)


def laid_out(net: nn.Module, x: torch.Tensor) -> torch.jit.ScriptModule:
    with warnings_ignored():
        traced = torch.jit.trace(net, x, check_trace=False)
        # In the compilation unit that all traces share, constants live as long as the process.
        own = _in_unit_of_its_own(traced.eval(), torch.device("cpu"))
        program = torch.jit.freeze(own)
    lay_out_channels_last(program)
    return program


def weights(program: torch.jit.ScriptModule) -> list[torch.Tensor]:
    found = [node.output().toIValue() for node in program.graph.findAllNodes("prim::Constant")]
    return [each for each in found if isinstance(each, torch.Tensor) and each.ndim > 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.inference_mode()
def test_values_are_those_of_the_module(name: str, dtype: torch.dtype) -> None:
    """At other numbers of items, too; the value has channels last, and the model is as it was."""
    net = made(name).to(dtype)
    program = laid_out(net, image(dtype=dtype))
    (weight,) = weights(program)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(each.is_contiguous() for each in net.parameters())
    for items in (1, 2, 5):
        x = image(items, dtype)
        value = program(x)
        torch.testing.assert_close(value, made(name).to(dtype)(x))
        depthwise_or_one_pixel = 1 in (weight.shape[1], weight.shape[-1])
        assert depthwise_or_one_pixel or value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Conv1d(CHANNELS, 4, 3), (2, CHANNELS, SIDE)),
        (nn.Conv3d(CHANNELS, 4, 3), (2, CHANNELS, 4, SIDE, SIDE)),
        (nn.Linear(CHANNELS, 4), (2, CHANNELS)),
    ],
)
@torch.inference_mode()
def test_other_layers_keep_their_weights(net: nn.Module, shape: tuple[int, ...]) -> None:
    """Channels last is a layout of four dimensions."""
    x = torch.rand(shape)
    program = laid_out(net.eval(), x)
    assert all(weight.is_contiguous() for weight in weights(program))
    torch.testing.assert_close(program(x), net(x))


@torch.inference_mode()
def test_weights_that_are_computed_stay() -> None:
    """Only a constant can be laid out once and for all."""

    class Computed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, x[:1, :, :3, :3])

    x = image()
    torch.testing.assert_close(laid_out(Computed(), x)(x), Computed()(x))


@torch.inference_mode()
def test_the_old_weights_are_freed() -> None:
    """Else a program would need the memory of two copies."""
    net = made("usual")
    program = laid_out(net, image())
    old = weakref.ref(net.weight.untyped_storage())
    before = net.weight.clone()
    del net
    gc.collect()
    assert old() is None
    torch.testing.assert_close(weights(program)[0], before)


class Viewed(nn.Module):
    """Works on the memory of a convolution's value, which must be in the usual order for that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        self.head = nn.Linear(CHANNELS * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(x.shape[0], -1))


class Recurrent(nn.Module):
    """Has an operation that checks no sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        self.rnn = nn.LSTM(36, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.conv(x).flatten(2))[0])


def viewed() -> nn.Module:
    return Viewed().eval()


def recurrent() -> nn.Module:
    return Recurrent().eval()


def plan(net: str, path: str, variant: str) -> Plan:
    """Return the TORCHSCRIPT plan of a layer of a net of this module."""
    model = load_model(ModelSpec(f"test_channels_last:{net}", item_shape=(3, 8, 8)))
    model = tried(model, PassScope(model.module))
    builder = PlanBuilder(model, Taps(model.module), measure(model))
    spec = PassSpec((CapturePoint(PointKind.MODULE, path),))
    key = PlanKey(Extractor.TORCHSCRIPT, spec, model.signature.key, variant=variant)
    *_, built = builder.steps(key)
    assert isinstance(built, Plan)
    assert built.key == key
    return built


@torch.inference_mode()
@pytest.mark.parametrize(
    ("net", "path", "reason"),
    [
        ("viewed", "head", "its program fails .*view size is not compatible"),
        ("recurrent", "head", "its native code could end the process"),
    ],
)
def test_programs_that_it_would_break_are_refused(net: str, path: str, reason: str) -> None:
    """Finished in the usual way they serve, and so does what comes before in both ways."""
    with pytest.raises(ExtractorUnsupportedError, match=reason):
        plan(net, path, CHANNELS_LAST)
    assert plan(net, path, "").refusal(2) == ""
    assert plan(net, "conv", CHANNELS_LAST).refusal(2) == ""
