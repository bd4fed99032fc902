"""Networks on which interventions are easy to get wrong."""

from __future__ import annotations

import torch
from torch import nn

import hfnets
from tinynets import seeded

IMAGE = (3, 32, 32)
IDS = (12,)


def resnet18() -> nn.Module:
    """Return a ResNet of torchvision, whose ReLUs work in place and run twice."""
    from torchvision.models import resnet18 as build

    return seeded(lambda: build(num_classes=10))


def mobilenet() -> nn.Module:
    """Return a MobileNet of torchvision, whose activations work in place."""
    from torchvision.models import mobilenet_v3_small

    return seeded(lambda: mobilenet_v3_small(num_classes=10))


def bert() -> nn.Module:
    """Return a small BERT with random weights."""
    return hfnets.built("BertModel", **{**hfnets.TEXT, "num_hidden_layers": 2})


def gpt2() -> nn.Module:
    """Return a small GPT-2 with random weights."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
    return hfnets.built("GPT2LMHeadModel", **sizes)


class Concatenates(nn.Module):
    """Keeps the batch size from before a layer, and joins its value with an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.more = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = len(x)
        first = self.conv(x)
        both = torch.cat([first, self.more(first).tanh()], 1)
        return self.fc(both.mean((2, 3)).reshape(batch, -1))


def concatenates() -> nn.Module:
    """Return a seeded Concatenates."""
    return seeded(Concatenates)


class Rolls(nn.Module):
    """Gives a wrong answer without an error if the batch grows in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = len(x)
        features = self.conv(x).mean((2, 3))
        # Of more rows than items it takes each time the last ones, and repeats them.
        return self.fc(features[-batch:].expand(len(features), -1))


def rolls() -> nn.Module:
    """Return a seeded Rolls."""
    return seeded(Rolls)


class Hidden(nn.Module):
    """Has a layer whose value the result does not depend on, though it runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.side = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        self.side(x)
        return self.fc(x.mean((2, 3)))


def hidden() -> nn.Module:
    """Return a seeded Hidden."""
    return seeded(Hidden)


class MaybeWhole(nn.Module):
    """Weights its scores by whole numbers if it is given any, else by ones in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.weights = nn.Identity()

    def forward(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        scores = self.fc(x.mean((2, 3)))
        if weights is None:
            weights = torch.ones_like(scores)
        return scores * self.weights(weights)


def maybe_whole() -> nn.Module:
    """Return a seeded MaybeWhole."""
    return seeded(MaybeWhole)


maybe_whole.inputs = {  # type: ignore[attr-defined]
    "x": "float32 [3, 8, 8]",
    "weights": "int64 [5], ids=3, optional",
}
