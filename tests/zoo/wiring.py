"""Models that are called, wired, named or loaded in ways that a hook or a walk does not expect."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch.utils.checkpoint import checkpoint

from zoo.remembering import Pair
from zoo.specimen import specimen


@specimen("A layer calls itself, so that its calls end in the reverse of their order")
class Recurses(nn.Module):
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            if not depth:
                return self.conv(x)
            return self.conv(x) + self(x * 0.5, depth - 1)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.tree = self.Tree()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tree(self.first(x))


@specimen("One module is called three times, and has two names")
class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.block
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.block(self.first(x)))
        return self.act(self.again(self.act(self.block(x))))


@specimen("Two modules share one weight, as input and output embeddings do")
class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 4, 8)
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(self.encode(x).flatten(1)))


@specimen("An instance's forward was replaced, as patches and quantisation tools do")
class PatchedForward(Pair):
    def __init__(self) -> None:
        super().__init__()
        inner = self.first.forward
        self.first.forward = lambda x: inner(x) * 2
        self.second.forward = types.MethodType(
            lambda module, x: F.conv2d(x, module.weight, padding=1), self.second
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("The model's own forward is a functools.partial, as Accelerate's hooks make it")
def partial_forward() -> nn.Module:
    class Scaled(Pair):
        def scaled(self, scale: float, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x) * scale)

    net = Scaled()
    net.forward = functools.partial(net.scaled, 0.5)
    return net


@specimen("A class overrides __call__, so that work is done around what hooks see")
class OverridesCall(Pair):
    class Normalised(nn.Conv2d):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x * 0.5) + 1

    def __init__(self) -> None:
        super().__init__()
        self.middle = self.Normalised(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.middle(self.first(x)))


@specimen("The model itself overrides __call__, as Keras-like wrappers do")
class RootOverridesCall(Pair):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x.clamp(-5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("Children are run by child.forward(x) or by their weights, so that no hook sees them")
class BypassesCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.silent = nn.Conv2d(4, 4, 1)
        self.weights = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.silent.forward(self.first(x))
        return self.last(F.conv2d(y, self.weights.weight))


@specimen("A forward hook of the model replaces what a layer returned")
class HookReplaces(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, given, output: output * 3)
        self.second.register_forward_pre_hook(lambda module, given: (given[0] + 1,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("Hooks are registered and removed inside forward, as attention maps are collected")
class HooksInForward(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = self.first.register_forward_hook(lambda m, a, output: seen.append(output))
        y = self.first(x)
        handle.remove()
        return self.second(y + seen[0])


@specimen("A full backward hook wraps what a layer returns, as gradient tools do")
class BackwardHook(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_full_backward_hook(lambda module, given, output: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("Blocks are run by torch.utils.checkpoint, both ways")
class Checkpointed(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(self.second, y, use_reentrant=True)


@specimen("The model is wrapped in DataParallel, which passes on to it on a machine without GPUs")
def data_parallel() -> nn.Module:
    class Net(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    return nn.DataParallel(Net())


@specimen("Old spectral and weight norm make the weight by a hook before each call, on the module")
class OldNorms(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.utils.spectral_norm(self.first)
        self.second = torch.nn.utils.weight_norm(self.second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("Parametrisations compute the weights when they are read: weight norm, orthogonal")
class Parametrised(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(self.first)
        self.second = torch.nn.utils.parametrizations.spectral_norm(self.second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("Weights are pruned by torch, whose hook multiplies a mask into them before each call")
class Pruned(Pair):
    def __init__(self) -> None:
        super().__init__()
        from torch.nn.utils import prune

        prune.random_unstructured(self.first, "weight", 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("train() merges low-rank weights into the main ones, so it must run once, as LoRA")
class MergesAtEval(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(4))

    def train(self, mode: bool = True) -> MergesAtEval:
        super().train(mode)
        if not mode:
            self.second.bias.data += self.low
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("train() is overridden and returns nothing, as in mmdetection's backbones")
class TrainReturnsNone(Pair):
    def train(self, mode: bool = True) -> None:
        super().train(mode)
        for parameter in self.first.parameters():
            parameter.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@specimen("Attributes can't be copied or pickled: a lock, a pool, a generator, a lambda")
class CannotCopy(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.numbers: Iterator[int] = iter(range(3))
        self.file = Path(__file__).open(encoding="utf-8")  # noqa: SIM115 - it is about this
        self.file.close()
        self.scale = lambda y: y * 2

    def __deepcopy__(self, memo: dict[int, Any]) -> CannotCopy:
        raise RuntimeError("this model can't be copied")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.second(self.scale(self.first(x)))


@specimen("Copies of the model share a child with it, by a __deepcopy__ of its own")
class CopiesShare(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesShare:
        other = CopiesShare()
        other.seen = self.seen
        return other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.seen.append(float(y.mean().nan_to_num(posinf=0, neginf=0)))
        return self.second(y + sum(self.seen))


@specimen("Children know their parent by an unregistered attribute, which makes a cycle")
class KnowsParent(Pair):
    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.parents = [parent]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.parents[0].offset

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child(self)
        self.offset = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.offset = float(y.mean().nan_to_num())
        return self.second(self.child(y))


@specimen("__getattr__ makes attributes up, and a property raises when it is read")
class OddAttributes(Pair):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("magic_"):
            return name
        return super().__getattr__(name)

    @property
    def broken(self) -> int:
        raise RuntimeError("not available in this state")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * len(self.magic_word))


@specimen("Names hold spaces, stars, brackets, colons, and look like a further call of another")
class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.odd = nn.ModuleDict(
            {
                "a b": nn.Conv2d(4, 4, 1),
                "x[0]": nn.Conv2d(4, 4, 1),
                "star*": nn.Conv2d(4, 4, 1),
                "y:input": nn.Conv2d(4, 4, 1),
                "größe": nn.Conv2d(4, 4, 1),
            }
        )
        self.act_1 = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        for layer in self.odd.values():
            x = layer(x)
        return self.act_1(self.act(x))


@specimen("Layers run in the threads of a pool that the model has")
class Threaded(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        with ThreadPoolExecutor(2) as pool:
            two = pool.submit(self.second, y)
            three = pool.submit(self.third, y)
            return two.result() + three.result()


@specimen("Layers run in torch.jit.fork and are waited for")
class Forked(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return torch.jit.wait(torch.jit.fork(self.second, y))


@specimen("One branch runs in a thread whose error is swallowed, as prefetchers do")
class SwallowsInThread(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        out: list[torch.Tensor] = []

        def work() -> None:
            try:
                out.append(self.second(y))
            except BaseException:  # noqa: BLE001 - as authors do
                out.append(y)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return out[0]


@specimen("A bare except around a block takes whatever is raised in it for a failure")
class SwallowsAll(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        try:
            y = self.second(y)
        except:  # noqa: E722 - as authors do
            y = self.third(-y)
        return self.third(y)


@specimen("It takes the input by a name of its own, with options behind it and **kwargs")
class NamedInput(Pair):
    def forward(self, pixel_values: torch.Tensor, flag: bool = True, **kwargs: Any) -> torch.Tensor:
        y = self.first(pixel_values)
        return self.second(y if flag and not kwargs else -y)


@specimen("forward takes *args")
class StarArguments(Pair):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(args[0]))


@specimen("A parameter stands on the root module, beside the children")
class RootParameter(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x * self.scale))


@specimen("The children run in another order than they were registered in, and skip one")
class OtherOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


@specimen("Children in order, with a function of the input added behind the second")
class OrderWithDetour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.two = nn.Conv2d(3, 3, 1)
        self.three = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x)) + torch.relu(x - 50))


@specimen("The module list is built and read by slices, and one block is left out by stride")
class SlicesList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks[::2]:
            x = block(x)
        return x


@specimen("A lazy module has no shape until it has run")
class LazyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8)
        self.head = nn.LazyLinear(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x).flatten(1))
