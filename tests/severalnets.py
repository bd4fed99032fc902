"""Models that take several inputs, by position, by name, optional, nested or through an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layertap.silence import warnings_ignored

ROWS = 50
WIDTH = 8


class Text(nn.Module):
    """Embeds ids and pools them under a mask, as text encoders do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def pooled(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the mean of the tokens that count."""
        weights = mask[..., None].float()
        return (self.embed(ids) * weights).sum(1) / weights.sum(1)


class Masked(Text):
    """Needs the mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, 4]."""
        return self.head(self.pooled(input_ids, attention_mask))


class HidesWholeMask(Text):
    """Passes its mask on only if it hides something, as transformers do."""

    class Pool(nn.Module):
        """Averages all tokens, or those that count."""

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            """Return [B, WIDTH]."""
            weights = torch.ones_like(x[..., :1]) if mask is None else mask[..., None]
            return (x * weights).sum(1) / weights.sum(1)

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.Pool()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, 4]."""
        hides = not bool(attention_mask.all())
        passed = attention_mask.float() if hides else None
        return self.head(self.pool(self.embed(input_ids), mask=passed))


class Optional(Text):
    """Takes a mask and types, or neither; the types run a module of their own."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> torch.Tensor:
        """Return [B, 4]."""
        assert input_ids is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = self.pooled(input_ids, mask)
        if token_type_ids is not None:
            pooled = pooled + self.types(token_type_ids).mean(1)
        return self.head(pooled)


class KeywordOnly(Text):
    """Takes its mask by name only."""

    def forward(self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, 4]."""
        return self.head(self.pooled(input_ids, attention_mask))


class TakesDict(Text):
    """Takes one dict of tensors."""

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return [B, 4]."""
        return self.head(self.pooled(features["input_ids"], features["mask"]))


class TakesPair(nn.Module):
    """Takes a tuple of species and coordinates, of different types and ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return [B, N, 2]."""
        species, coordinates = pair
        return self.head(self.embed(species) * coordinates)


class Rest(nn.Module):
    """Takes any number of tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 2)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return [B, 2]."""
        return self.head(torch.cat(tensors, -1))


class Diffusion(nn.Module):
    """Takes an image and the step of each, as diffusion models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Embedding(1000, 4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return [B, 4, H, W]."""
        return self.conv(sample) + self.time(timestep)[..., None, None]


class TwoImages(nn.Module):
    """Takes two images of one size, as models of optical flow do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
        """Return [B, 4, H, W]."""
        return self.conv(torch.cat([image1, image2], 1))


class Lengths(nn.Module):
    """Takes series and the length of each, of which one must be the longest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return [B, T, 2]."""
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        padded, _ = nn.utils.rnn.pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=x.shape[1]
        )
        return self.head(padded)


class Settings(nn.Module):
    """Takes an object of tensors, which only an adapter can make."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 2)

    def forward(self, graph: Any) -> torch.Tensor:
        """Return [B, 2]."""
        return self.head(graph.nodes + graph.edges)


class Graph:
    """Nodes and edges."""

    def __init__(self, nodes: torch.Tensor, edges: torch.Tensor) -> None:
        self.nodes = nodes
        self.edges = edges


class NeedsFlag(nn.Module):
    """Needs a flag, which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        """Return [B, 2]."""
        return self.head(x) if training else x


def masked() -> nn.Module:
    """Return a model with a required mask."""
    return Masked().eval()


def declared_mask() -> nn.Module:
    """Return the same model; its factory declares the inputs."""
    return Masked().eval()


def hides_whole_mask() -> nn.Module:
    """Return a model whose mask arrives at a layer for some inputs only."""
    return HidesWholeMask().eval()


declared_mask.inputs = hides_whole_mask.inputs = {  # type: ignore[attr-defined]
    "input_ids": "int64 [sequence=16], ids=50",
    "attention_mask": "int64 [sequence=16], mask",
}


def optional() -> nn.Module:
    """Return a model with optional inputs."""
    return Optional().eval()


def keyword_only() -> nn.Module:
    """Return a model with an input that is given by name only."""
    return KeywordOnly().eval()


def takes_dict() -> nn.Module:
    """Return a model of one dict, which is declared."""
    return TakesDict().eval()


takes_dict.inputs = {  # type: ignore[attr-defined]
    "features.input_ids": "int64 [sequence=6], ids=50",
    "features.mask": "int64 [sequence=6], mask",
}


def takes_pair() -> nn.Module:
    """Return a model of one tuple, of which there is an example."""
    return TakesPair().eval()


def _pair(size: int) -> dict[str, torch.Tensor]:
    return {"pair.0": torch.randint(0, 9, (size, 4)), "pair.1": torch.randn(size, 4, 3)}


takes_pair.example = _pair  # type: ignore[attr-defined]


def rest() -> nn.Module:
    """Return a model of ``*tensors``."""
    return Rest().eval()


rest.inputs = {"left": "float32 [4]", "right": "float32 [2]"}  # type: ignore[attr-defined]


def diffusion() -> nn.Module:
    """Return a model of images and steps."""
    return Diffusion().eval()


def two_images() -> nn.Module:
    """Return a model of two images."""
    return TwoImages().eval()


def lengths() -> nn.Module:
    """Return a model of series and lengths, of which there is an example."""
    return Lengths().eval()


def _series(size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(size, 7, 6), "lengths": torch.randint(1, 8, (size,))}


lengths.example = _series  # type: ignore[attr-defined]


def adapted() -> nn.Module:
    """Return a model of an object, with an adapter that makes it."""
    return Settings().eval()


def _graph(tensors: dict[str, torch.Tensor]) -> tuple[tuple[Graph], dict[str, Any]]:
    return (Graph(tensors["nodes"], tensors["edges"]),), {}


adapted.inputs = {"nodes": "float32 [3]", "edges": "float32 [3]"}  # type: ignore[attr-defined]
adapted.arguments = _graph  # type: ignore[attr-defined]


def needs_flag() -> nn.Module:
    """Return a model that needs a flag."""
    return NeedsFlag().eval()


def scripted() -> nn.Module:
    """Return a TorchScript program of two inputs."""
    with warnings_ignored():  # torch.jit is deprecated.
        return torch.jit.script(Masked().eval())  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Two towers in the manner of open_clip, without a joint part but their similarity."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.words = nn.Embedding(20, 4)
        self.project = nn.Linear(4, 4)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.visual(image).flatten(1)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.project(self.words(text).mean(1))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return (self.encode_image(image) * self.encode_text(text)).sum(1)


def towers() -> nn.Module:
    """Return a model with two towers, which its factory names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair().eval()


towers.inputs = {  # type: ignore[attr-defined]
    "image": "float32 [3, H=8, W=8]",
    "text": "int64 [length=6], ids=20",
}
towers.towers = {"encode_image": ["image"], "encode_text": ["text"]}  # type: ignore[attr-defined]
