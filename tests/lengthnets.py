"""Models of token ids that leave padding alone, and models whose values padding changes."""

from __future__ import annotations

import torch
from torch import nn

ROWS = 50
WIDTH = 8


class Tokens(nn.Module):
    """Embeds ids; the module ``each`` sees one token at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.each = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [B, L, WIDTH]."""
        return self.each(self.embed(ids))


class MaskedMean(Tokens):
    """Pools under the mask, so padding changes nothing."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, 4]."""
        weights = attention_mask[..., None].float()
        states = self.states(input_ids)
        return self.head((states * weights).sum(1) / weights.sum(1))


class PlainMean(Tokens):
    """Takes a mask and ignores it in the mean over all positions, so padding leaks into it."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, 4]."""
        return self.head(self.states(input_ids).mean(1) + 0 * attention_mask.sum(1, True))


class OverTime(Tokens):
    """A convolution reaches from the last token into the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        mixed = self.conv(self.states(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head(mixed * attention_mask[..., None])


class NormalizedOverTime(Tokens):
    """Divides by the spread over all positions of an item."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(WIDTH)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        normed = self.norm(self.states(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head(normed * attention_mask[..., None])


class FromTheEnd(Tokens):
    """Numbers positions from the end, as models that want padding on the left do."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(64, WIDTH)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        places = torch.arange(input_ids.shape[1]).flip(0)
        return self.head(self.states(input_ids) + self.places(places)) * attention_mask[..., None]


class LongIsDifferent(Tokens):
    """Treats input of more than twelve tokens in another way, as some attention does."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        states = self.states(input_ids)
        return self.head(states if input_ids.shape[1] <= 12 else states * 2)


class ManyAreDifferent(Tokens):
    """Treats a batch of more than twenty items in another way."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        states = self.states(input_ids)
        return self.head(states if len(input_ids) <= 20 else states * 2)


class LooksAtIds(Tokens):
    """Branches on the largest id of the whole batch."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        states = self.states(input_ids)
        return self.head(states if int(input_ids.max()) < ROWS - 1 else states + 1e-7)


class Causal(nn.Module):
    """A running sum: each position sees those before it, so padding on the right is not seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        return self.head(self.embed(input_ids).cumsum(1))


class Recurrent(nn.Module):
    """An LSTM in both directions reads the padding first, so padding leaks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return [B, L, 4]."""
        return self.head(self.lstm(self.embed(input_ids))[0])
