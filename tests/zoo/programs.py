"""Models that hold programs, differentiate, transform functions, or are quantised."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from contentnets import Int8
from zoo.remembering import Pair
from zoo.specimen import finite, specimen

ITEM = (3, 8, 8)


class Plain(Pair):
    """Two convolutions in a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@specimen("The whole model is a TorchScript program", twin=Plain)
def scripted_model() -> nn.Module:
    return torch.jit.script(Plain())


@specimen("A child is a scripted program with layers of its own, as in compiled heads",
          twin=lambda: ScriptedChild(scripted=False))  # fmt: skip
class ScriptedChild(nn.Module):
    def __init__(self, *, scripted: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.inner = torch.jit.script(inner) if scripted else inner
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


@specimen("A child was traced on one size, and keeps that size's constants",
          twin=lambda: TracedChild(traced=False))  # fmt: skip
class TracedChild(nn.Module):
    def __init__(self, *, traced: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 4)).eval()
        example = torch.zeros(2, 4, 8, 8)
        self.inner = torch.jit.trace(inner, example, check_trace=False) if traced else inner
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


class Accumulates(nn.Module):
    """Adds to a buffer, in a program."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add one to the buffer, and multiply by it."""
        self.total += 1
        return x * self.total


@specimen("A scripted child keeps state in a buffer of its program",
          twin=lambda: ScriptedState(scripted=False))  # fmt: skip
class ScriptedState(Pair):
    def __init__(self, *, scripted: bool = True) -> None:
        super().__init__()
        self.count = torch.jit.script(Accumulates()) if scripted else Accumulates()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.count(self.first(x)))


@torch.jit.script
def _sign_of_mean(x: torch.Tensor) -> torch.Tensor:
    if bool(x.mean() > 0):
        return x
    return -x


@specimen("A scripted function branches on values, which a trace keeps as a branch")
class ScriptedBranch(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(_sign_of_mean(self.first(x)))


@specimen("A child is a torch.fx.GraphModule")
class GraphChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(True)))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


@specimen("A child is compiled by torch.compile, without code generation",
          twin=lambda: CompiledChild(compiled=False))  # fmt: skip
class CompiledChild(nn.Module):
    def __init__(self, *, compiled: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        if compiled:
            self.inner = torch.compile(self.inner, backend="eager")
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


def _compiled_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


@specimen("torch.compile was applied to the whole model, without code generation",
          twin=_compiled_convolutions)  # fmt: skip
def compiled_model() -> nn.Module:
    return torch.compile(_compiled_convolutions(), backend="eager")


@specimen("A weight holds other tensors in place of memory of its own, as torchao's do")
class WrappedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8)
        self.middle = nn.Linear(4, 5)
        self.middle.weight = nn.Parameter(Int8.of(self.middle.weight), requires_grad=False)
        self.last = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x).flatten(1).relu()))


@specimen("The neighbours of a graph's nodes are a sparse parameter")
class SparseWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 8)
        neighbours = torch.rand(6, 6)
        neighbours[neighbours < 0.5] = 0
        self.neighbours = nn.Parameter(neighbours.to_sparse(), requires_grad=False)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.neighbours @ self.first(x).flatten(1).T).T)


@specimen("Linear layers are quantised dynamically, by the range of the whole batch",
          requests=finite(ITEM))  # fmt: skip
def quantised_dynamically() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 8), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    return torch.ao.quantization.quantize_dynamic(net.eval(), {nn.Linear}, dtype=torch.qint8)


class Quantisable(nn.Module):
    """What torch's static quantisation turns into an int8 model."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.second = nn.Conv2d(4, 4, 1)
        self.dequant = torch.ao.quantization.DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dequant(self.second(self.act(self.first(self.quant(x)))))


@specimen("Static quantisation makes tensors of a quantised type between the layers",
          requests=finite(ITEM))  # fmt: skip
def quantised_statically() -> nn.Module:
    net = Quantisable().eval()
    net.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(net)
    prepared(torch.rand(4, *ITEM))
    return torch.ao.quantization.convert(prepared)


@specimen("Fake quantisation observes ranges in evaluation mode too, as after careless QAT",
          requests=finite(ITEM))  # fmt: skip
def quantised_in_training() -> nn.Module:
    net = Quantisable().train()
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(net)


@specimen("Forces are the gradient of an energy, taken inside forward, as in molecular models",
          item=(5, 3), requests=finite((5, 3)))  # fmt: skip
class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.energy = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.energy(torch.tanh(self.embed(x))).sum()
            (gradient,) = torch.autograd.grad(energy, x)
        return -gradient


@specimen("It adapts to each input by gradient steps on its own parameters, in place",
          requests=finite(ITEM))  # fmt: skip
class TrainsAtTest(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            bias = self.second.bias
            bias.requires_grad_(True)
            loss = self.second(self.first(x).detach()).square().mean()
            (gradient,) = torch.autograd.grad(loss, bias)
        with torch.no_grad():
            bias.sub_(0.1 * gradient.clamp(-1, 1))
        bias.requires_grad_(False)
        return self.second(self.first(x))


class RoundThrough(torch.autograd.Function):
    """Rounds forwards, and passes gradients through."""

    @staticmethod
    def forward(context: object, x: torch.Tensor) -> torch.Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@specimen("A Python autograd.Function rounds, as straight-through estimators do")
class StraightThrough(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(RoundThrough.apply(self.first(x)))


@specimen("An ensemble runs by vmap, inside of which layers see no plain tensors")
class VmapEnsemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8)
        self.head = nn.Linear(4, 2)
        self.scales = nn.Parameter(torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).flatten(1)
        return torch.vmap(lambda scale: self.head(y * scale))(self.scales).mean(0)


@specimen("A child runs by functional_call with other weights, as in hyper-networks")
class FunctionalCall(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        weights = {name: value * 2 for name, value in self.second.named_parameters()}
        return torch.func.functional_call(self.second, weights, (y,)) + self.second(y)


@specimen("A Jacobian is taken by torch.func, so that layers see tensors of its own kind",
          item=(4,), requests=finite((4,)))  # fmt: skip
class TakesJacobian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        gradient = torch.func.vmap(torch.func.grad(lambda row: self.second(row).sum()))(y)
        return gradient + self.second(y)


@torch.library.custom_op("layertap_zoo::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """Return twice the tensor, computed where torch can't look."""
    return torch.from_numpy(x.detach().numpy() * 2)


@specimen("A custom operator of a library runs between the layers")
class CustomOperator(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.ops.layertap_zoo.twice(self.first(x)))


@specimen("forward is decorated with inference_mode, whose results autograd can't use")
class InferenceMode(Pair):
    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("Parts of the model are copied inside forward, so that other modules run than its own")
class CopiesItself(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        other = copy.deepcopy(self.second)
        return other(y) + self.second(y)


@specimen("The grid of a sampler is made by a layer, as in spatial transformers")
class SamplesGrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.locate = nn.Conv2d(4, 6, 8)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        grid = F.affine_grid(self.locate(y).view(-1, 2, 3), list(y.shape), align_corners=False)
        return self.out(F.grid_sample(y, grid, align_corners=False))
