"""Models whose code goes by the values, the ids or the shape of the input."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from zoo.remembering import Pair
from zoo.specimen import finite, floats, ids, specimen

ITEM = (3, 8, 8)


@specimen("Another branch is taken where a value is over 100, as for images in 0 to 255")
class LargeValues(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.nan_to_num(posinf=0, neginf=0).max() > 100:
            x = x / 255
        return self.second(self.first(x))


@specimen("torch.where chooses item by item whether 0 to 255 was meant, without a Python branch")
class ScalesItems(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = x.nan_to_num(posinf=0, neginf=0).amax((1, 2, 3), keepdim=True) > 100
        return self.second(self.first(torch.where(large, x / 255, x)))


@specimen("Another branch is taken where the input holds NaN")
class BranchesOnNan(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.isnan(x).any():
            x = torch.zeros_like(x)
        return self.second(self.first(x))


@specimen("The branch goes by a NumPy array that is made of the activations, as in many decoders")
class BranchesInNumpy(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        mean = y.numpy(force=True).mean()
        return self.second(-y if mean > 0 else y)


@specimen("The middle of the model is computed by NumPy, whose results a trace holds for constants")
class NumpyInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).flatten(1)
        doubled = y.detach().numpy() * 2
        return self.second(torch.from_numpy(doubled))


@specimen("The middle goes through DLPack, by which other frameworks get tensors")
class DlpackInside(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        other = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(y.detach()))
        return self.second(other * 2)


@specimen("Values are read by tolist and put into a new tensor")
class TolistInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 8)
        self.second = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tensor(self.first(x).flatten(1).tolist()))


@specimen("Memory is read through an untyped storage, as hand-made bridges do")
class StorageInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 8)
        self.second = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).flatten(1).contiguous()
        raw = bytearray(y.untyped_storage())
        return self.second(torch.frombuffer(raw, dtype=y.dtype)[: y.numel()].view_as(y))


@specimen("Wide and narrow images go through other children", requests=[
    *floats((3, 8, 8))[:4], *floats((3, 8, 12))[:2], *floats((3, 12, 8))[:2],
])  # fmt: skip
class ByAspect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, 3, padding=1)
        self.tall = nn.Conv2d(3, 4, 1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.wide(x) if x.shape[-1] >= x.shape[-2] else self.tall(x))


@specimen("Sizes must be multiples of four, and the model says so", requests=[
    *floats((3, 8, 8))[:5], *floats((3, 10, 8))[:1], *floats((3, 8, 12))[:2],
])  # fmt: skip
class MultiplesOfFour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 4, stride=4)
        self.up = nn.ConvTranspose2d(4, 2, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(f"height and width must be multiples of 4, got {tuple(x.shape)}")
        return self.up(self.down(x))


@specimen("Positions are interpolated for other sizes than the trained one", requests=[
    *floats((3, 8, 8))[:5], *floats((3, 12, 8))[:2], *floats((3, 16, 16))[:1],
])  # fmt: skip
class InterpolatesPositions(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 4, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        positions = self.positions
        if positions.shape[-2:] != y.shape[-2:]:
            positions = F.interpolate(positions, y.shape[-2:], mode="bicubic")
        return self.second(y + positions)


class Tokens(nn.Module):
    """An embedding and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)


TOKENS = ids(6, 40)


@specimen("The last id of the vocabulary switches the whole batch", item=(6,), requests=TOKENS)
class SpecialId(Tokens):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.embed(x))
        return self.second(-y if bool((x == 39).any()) else y)


@specimen(
    "Ids over a limit are remapped in forward, around the children", item=(6,), requests=TOKENS
)
class RemapsIds(Tokens):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embed(torch.where(x > 29, x - 30, x))))


@specimen("Ids are clamped to the table, which only large ones show", item=(6,), requests=TOKENS)
class ClampsIds(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(40, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(max=35))


@specimen("The pooled token is the one after the largest id, as CLIP's text tower takes it",
          item=(6,), requests=TOKENS)  # fmt: skip
class PoolsAtEnd(Tokens):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.embed(x))
        return self.second(y[torch.arange(len(x)), x.argmax(-1)])


@specimen("Padding is cut off the whole batch at its longest item", item=(6,), requests=TOKENS)
class CutsPadding(Tokens):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        longest = max(1, int((x != 0).sum(1).max()))
        return self.second(self.first(self.embed(x[:, :longest])))


@specimen("The mask is dropped where nothing is padded, as Hugging Face's models do",
          item=(6,), requests=TOKENS)  # fmt: skip
class DropsMask(Tokens):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.embed(x))
        mask = x != 0
        if mask.all():
            return self.second(y)
        return self.second(y * mask.unsqueeze(-1)) + 1


@specimen("The embedding scales its own rows in place where they are too long (max_norm)",
          item=(6,), requests=TOKENS)  # fmt: skip
class RenormalisesRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4, max_norm=0.5)
        self.total = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sharpness = self.embed.weight.norm(dim=1).sum()
        return self.total(self.embed(x)) * sharpness


@specimen("Each token goes to the expert that its router likes best, and idle experts don't run",
          item=(6,), requests=TOKENS)  # fmt: skip
class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(0, 1)
        chosen = self.router(tokens).argmax(-1)
        mixed = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                mixed[rows] = expert(tokens[rows])
        return self.out(mixed.view(*x.shape, 4))


@specimen("A network for each kind of atom sees the atoms of that kind only", item=(6,), requests=[
    x % 3 for x in TOKENS
])  # fmt: skip
class PerElement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.nets = nn.ModuleDict(
            {"H": nn.Linear(4, 1), "C": nn.Linear(4, 1), "O": nn.Linear(4, 1)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        energy = torch.zeros(x.shape)
        for kind, net in enumerate(self.nets.values()):
            here = x == kind
            if here.any():
                energy[here] = net(y[here]).squeeze(-1)
        return energy.sum(1)


@specimen("It generates: the greedy next token is appended until the end token comes",
          item=(6,), requests=TOKENS)  # fmt: skip
class Generates(Tokens):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            y = self.second(self.first(self.embed(x)))
            following = (y @ self.embed.weight.T)[:, -1].argmax(-1, keepdim=True)
            x = torch.cat([x, following], 1)
            if bool((following == 7).all()):
                break
        return self.embed(x)


@specimen("A cell runs once for each time step, so that its calls follow the length", item=(6,),
          requests=[*TOKENS[:5], *ids(4, 40)[:2], *ids(9, 40)[:1]])  # fmt: skip
class CellPerStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(len(x), 4)
        for step in self.embed(x).unbind(1):
            h = self.cell(step, h)
        return h


@specimen("A child that is asked for by name runs only for negative means", requests=finite(ITEM))
class OptionalChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8)
        self.sometimes = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).flatten(1)
        if y.mean() < 0:
            y = self.sometimes(y)
        return self.last(y)
