"""Recurrent networks and transformers: packed sequences, masks, fast paths, several results."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.specimen import finite, floats, ids, specimen

TOKENS = ids(6, 40)


@specimen("An LSTM returns (output, (h, c)), batch second", item=(6,), requests=TOKENS)
class LstmBatchSecond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.lstm = nn.LSTM(4, 5, num_layers=2, bidirectional=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (hidden, _) = self.lstm(self.embed(x).transpose(0, 1))
        return self.head(y[-1]) + hidden.mean()


@specimen("A Sequential ends in an LSTM, so that what both return has the same keys")
class EndsInLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.Sequential(nn.Linear(8, 4), nn.LSTM(4, 5, batch_first=True))
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (hidden, cell) = self.rnn(x.mean(1))
        return self.head(y + hidden.transpose(0, 1) * cell.transpose(0, 1))


@specimen("Packed sequences go between layers, sorted by length", item=(6,), requests=TOKENS)
class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x != 0).sum(1).clamp(min=1)
        packed = pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        y, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.head(y.sum(1))


@specimen("torch's encoder has a fast path, which calls no child", item=(6,), requests=TOKENS)
class FastPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(x))


@specimen("A padding mask makes the fast path pack its tokens into a nested tensor",
          item=(6,), requests=TOKENS)  # fmt: skip
class MaskedFastPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x == 0
        mask[:, 0] = False
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=mask)[:, 0])


@specimen("The attention weights are an optional second result", item=(6,), requests=TOKENS)
class AttentionWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        attended, weights = self.attention(y, y, y, need_weights=True, average_attn_weights=False)
        return self.norm(y + attended) * weights.sum()


@specimen("A causal mask is a buffer that is sliced by the length", item=(6,),
          requests=[*TOKENS[:5], *ids(3, 40)[:2], *ids(9, 40)[:1]])  # fmt: skip
class CausalBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(self.embed(x)).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(self.mask[:length, :length] == 0, float("-inf"))
        return self.out(scores.softmax(-1) @ v)


@specimen("Rows that are all padding give NaN out of softmax", item=(6,), requests=TOKENS)
class FullyMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.first = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.embed(x))
        scores = (y @ y.transpose(1, 2)).masked_fill((x == 0)[:, None], float("-inf"))
        return self.out((scores.softmax(-1) @ y).nan_to_num())


@specimen("Bags of words go by offsets that are made of the ids", item=(6,), requests=TOKENS)
class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 4, mode="mean")
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x != 0).sum(1)
        offsets = lengths.cumsum(0) - lengths
        return self.head(self.bag(x[x != 0], offsets))


@specimen("Waveforms of any length are framed and transformed, as in speech models", item=(256,),
          requests=[*floats((256,))[:5], *floats((400,))[:2], *floats((320,))[:1]])  # fmt: skip
class Waveform(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.first = nn.Conv1d(33, 8, 3, padding=1)
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(x, 64, 32, window=self.window, return_complex=True).abs()
        return self.out(self.first(spectrum.clamp(min=1e-5).log()).mean(2))


@specimen("Series are normalised by their own mean and deviation and scaled back, as in RevIN",
          item=(16, 3), requests=floats((16, 3)))  # fmt: skip
class ReversibleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(16, 16)
        self.mix = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
        y = (x - mean) / deviation
        y = self.mix(y + self.line(y.transpose(1, 2)).transpose(1, 2))
        return y * deviation + mean


@specimen("Points are sampled farthest first, each choice after the last", item=(12, 3),
          requests=finite((12, 3)))  # fmt: skip
class FarthestPoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x))
        chosen = torch.zeros(len(x), dtype=torch.int64)
        distance = torch.full(x.shape[:2], float("inf"))
        picked = [chosen]
        for _ in range(3):
            distance = torch.minimum(distance, (x - x[rows, chosen][:, None]).square().sum(-1))
            chosen = distance.argmax(1)
            picked.append(chosen)
        points = x.gather(1, torch.stack(picked, 1)[..., None].expand(-1, -1, 3))
        return self.out(F.relu(self.embed(points)).amax(1))
