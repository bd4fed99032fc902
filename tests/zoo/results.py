"""Models whose layers return something else than one plain tensor of its own memory."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.remembering import Pair
from zoo.specimen import floats, specimen

ITEM = (3, 8, 8)


class Calls(nn.Module):
    """A layer that returns what a function makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@dataclass
class Output:
    """A result as Hugging Face's models have it."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None
    extra: tuple[torch.Tensor, ...] = ()


@specimen("A layer returns a dataclass with None and a tuple in it, as Hugging Face's do")
class ReturnsDataclass(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.pack = Calls(lambda y: Output(y, None, (y.mean((2, 3)), y.amax((2, 3)))))

    def forward(self, x: torch.Tensor) -> Output:
        out = self.pack(self.first(x))
        return Output(self.second(out.hidden), out.extra[0])


@specimen("Dictionaries have integers, dots, spaces and tuples for keys")
class OddKeys(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.pack = Calls(lambda y: {0: y, "a.b": y * 2, "c d": y * 3, ("e", 1): y * 4})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.pack(self.first(x))
        return self.second(packed[0] + packed["a.b"])


@specimen("Two keys of a dictionary have one text, 1 and '1'")
class EqualTexts(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.pack = Calls(lambda y: {1: y, "1": -y})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.pack(self.first(x))
        return self.second(packed[1] + 2 * packed["1"])


Boxes = namedtuple("Boxes", ["corners", "scores"])


@specimen("A named tuple holds another one, and a string and a number beside the tensors")
class NestedTuples(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.pack = Calls(lambda y: (Boxes(y, Boxes(y * 2, "name")), 3.5, None, [y * 3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        boxes, factor, _, (last,) = self.pack(self.first(x))
        return self.second(boxes.scores.corners * factor + last)


@specimen("A list that a layer returned is emptied, reversed and written to by its caller")
class EmptiesList(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.pack = Calls(lambda y: [y, y * 2, y * 3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = self.pack(self.first(x))
        levels.reverse()
        levels[0].mul_(-1)
        y = levels.pop()
        y.add_(levels.pop(0))
        levels.clear()
        return self.second(y)


@specimen("A dictionary that a layer returned is changed by its caller, key by key")
class ChangesDict(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.pack = Calls(lambda y: OrderedDict(high=y, low=y * 2))

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        levels = self.pack(self.first(x))
        levels["high"] = self.second(levels.pop("low"))
        levels["more"] = levels["high"] * 2
        return levels


@specimen("The list has as many tensors as the content asks for, none at times")
class ListByContent(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.split = Calls(lambda y: [row for row in y.flatten(2)[0, :, :4] if row.sum() > 0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        rows = self.split(y)
        return self.second(y) + len(rows)


@specimen("The list has one tensor for each item of the batch, as detectors return")
class ListByItem(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.split = Calls(lambda y: list(y.unbind(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.stack(self.split(self.first(x))))


@specimen("Layers return numbers, text and None, and no tensor at all")
class NoTensors(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.number = Calls(lambda y: float(y.shape[-1]))
        self.text = Calls(lambda y: "name")
        self.nothing = Calls(lambda y: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.nothing(y)
        return self.second(y) * self.number(y) + len(self.text(y))


@specimen("A layer returns nothing for some inputs and a tensor for others")
class SometimesNone(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.maybe = Calls(lambda y: y * 2 if y.nan_to_num().mean() > 0 else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        extra = self.maybe(y)
        return self.second(y if extra is None else y + extra)


@specimen("A layer returns a tensor for some inputs and a tuple for others")
class SometimesTuple(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.maybe = Calls(lambda y: y if y.nan_to_num().mean() > 0 else (y * 2, y))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.maybe(self.first(x))
        return self.second(y if isinstance(y, torch.Tensor) else y[0])


@specimen("A layer is a generator, whose values must not be used up by who looks at them")
class ReturnsGenerator(Pair):
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            yield x
            yield x * 2

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.Steps()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(sum(self.steps(self.first(x))))


class Once:
    """A mapping-like result whose members may be read once."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value: torch.Tensor | None = value

    def take(self) -> torch.Tensor:
        value, self._value = self._value, None
        if value is None:
            raise RuntimeError("taken already")
        return value

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield self.take()


@specimen("A layer returns an object whose content may be read once only")
class ReadOnce(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.wrap = Calls(Once)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.wrap(self.first(x)).take())


@specimen("A layer returns an expanded tensor, all of whose rows are one place in memory")
class Expanded(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.grow = Calls(lambda y: y.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.grow(self.first(x)))


@specimen("A layer returns windows that overlap in memory (unfold), of which one is written to")
class OverlappingWindows(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.windows = Calls(lambda y: y.unfold(3, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        windows = self.windows(y)
        windows[..., 0].add_(1)
        return self.second(y + windows.mean())


@specimen("Layers return transposed, flipped and channels-last memory")
class OddStrides(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.turn = Calls(lambda y: y.transpose(2, 3))
        self.last = Calls(lambda y: y.to(memory_format=torch.channels_last))
        self.every = Calls(lambda y: y[:, ::2, 1::2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.turn(self.first(x)))
        return self.second(y) + self.every(y).mean()


@specimen("A layer returns no rows, or none of its channels")
class ZeroSizes(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.none = Calls(lambda y: y[:, :0])
        self.nobody = Calls(lambda y: y[:0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(torch.cat([y, self.none(y)], 1)) + self.nobody(y).sum()


@specimen("A layer returns tensors without dimensions")
class Scalars(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.mean = Calls(lambda y: y.mean())
        self.count = Calls(lambda y: torch.tensor(y.numel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y + self.mean(y)) / self.count(y)


@specimen("A layer returns a tensor on the meta device, which has a shape and no values")
class MetaTensor(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.probe = Calls(lambda y: torch.empty_like(y, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y) * self.probe(y).shape[1]


@specimen("A layer returns a sparse tensor")
class SparseTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8)
        self.sparse = Calls(lambda y: (y * (y > 0)).to_sparse())
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.sparse(self.first(x).flatten(1)).to_dense())


@specimen("A layer returns a nested tensor, whose items have lengths of their own")
class NestedTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.nest = Calls(
            lambda y: torch.nested.nested_tensor([item[: 1 + n % 3] for n, item in enumerate(y)])
        )
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nested = self.nest(self.first(x).flatten(2)[..., :8])
        return self.last(torch.nested.to_padded_tensor(nested, 0.0))


class Labelled(torch.Tensor):
    """A tensor of the author's own class."""


@specimen("A layer returns a subclass of Tensor, as torchvision's images and masked tensors are")
class TensorSubclass(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.label = Calls(lambda y: y.as_subclass(Labelled))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.label(self.first(x)).as_subclass(torch.Tensor))


@specimen("A layer returns its own parameter, and its input as it got it")
class ReturnsParameter(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.own = Calls(lambda: self.bias)
        self.same = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.same(x))
        return self.second(y + self.own())


@specimen("A Sequential passes tuples from child to child", requests=floats(ITEM))
class TuplesInSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), Calls(lambda y: (y, y * 2)), Calls(lambda p: p[0] + p[1])
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y, y.mean((2, 3))


@specimen("A layer is given keyword arguments, an optional tensor and a list of tensors")
class ManyArguments(Pair):
    class Mixes(nn.Module):
        def forward(
            self,
            x: torch.Tensor,
            others: list[torch.Tensor],
            *,
            mask: torch.Tensor | None = None,
            scale: float = 1.0,
        ) -> torch.Tensor:
            y = x + sum(others)
            return y * scale if mask is None else y * mask

    def __init__(self) -> None:
        super().__init__()
        self.mix = self.Mixes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = self.mix(y, [y, y * 2], scale=0.5)
        return self.second(self.mix(x=y, others=[y], mask=y > 0))
