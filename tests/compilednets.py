"""Tiny networks that torch.compile was applied to, each in another way. All take [B, 3, 8, 8]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tinynets import seeded

ITEM = (3, 8, 8)

ran: list[Any] = []
"""The graphs that torch.compile has handed to its backend."""


def _backend(graph: Any, inputs: Any) -> Callable[..., Any]:
    ran.append(graph)
    return graph.forward


def compiled(what: Any) -> Any:
    """Compile a module or a function so that it is noticed when it runs."""
    return torch.compile(what, backend=_backend)


class Plain(nn.Module):
    """The network without torch.compile."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(4, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class ByDecorator(Plain):
    """Its class has a compiled forward."""

    @compiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class ByTwoDecorators(Plain):
    """Its compiled forward has autocast around it."""

    @torch.autocast("cpu", torch.bfloat16)
    @compiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Disabled(Plain):
    """Its class keeps torch.compile out of forward, which says nothing about layertap."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def plain() -> nn.Module:
    """Return a seeded Plain."""
    return seeded(Plain)


def whole() -> nn.Module:
    """Return the network, compiled."""
    return compiled(plain())


def in_place() -> nn.Module:
    """Return the network, compiled by its own method."""
    net = plain()
    net.compile(backend=_backend)
    return net


def child() -> nn.Module:
    """Return the network with a compiled child."""
    net = plain()
    net.body = compiled(net.body)
    return net


def child_in_place() -> nn.Module:
    """Return the network with a child that was compiled by its own method."""
    net = plain()
    net.body.compile(backend=_backend)
    return net


def by_forward() -> nn.Module:
    """Return the network with a compiled forward of its own."""
    net = plain()
    net.forward = compiled(net.forward)
    return net


def by_decorator() -> nn.Module:
    """Return a seeded ByDecorator."""
    return seeded(ByDecorator)


def by_two_decorators() -> nn.Module:
    """Return a seeded ByTwoDecorators."""
    return seeded(ByTwoDecorators)


def hooked() -> nn.Module:
    """Return the network, compiled, with a hook on what torch.compile returned."""
    net = compiled(plain())
    net.register_forward_hook(lambda module, args, output: output + 1)
    return net


def disabled() -> nn.Module:
    """Return a seeded Disabled."""
    return seeded(Disabled)


exported_file = ""
"""Where the tests keep a program of torch.export."""


def exported() -> nn.Module:
    """Return what torch.export stored, which calls no modules."""
    return torch.export.load(exported_file).module()


def unflattened() -> nn.Module:
    """Return what torch.export stored, with its modules."""
    return torch.export.unflatten(torch.export.load(exported_file))
