"""Networks in float64, whose values agree closely on any two devices."""

from __future__ import annotations

import torch

import editnets
import hfnets
import lengthnets
from tinynets import seeded


def resnet18() -> torch.nn.Module:
    """Return a ResNet of torchvision in float64."""
    return editnets.resnet18().double()


def gpt2() -> torch.nn.Module:
    """Return a small GPT-2 in float64."""
    return editnets.gpt2().double()


def bert() -> torch.nn.Module:
    """Return a small BERT in float64, which takes ids and a mask."""
    return hfnets.built("BertModel", **{**hfnets.TEXT, "num_hidden_layers": 2}).double()


bert.inputs = {"input_ids": "int64 [L=12]", "attention_mask": "int64 [L=12]"}  # type: ignore[attr-defined]


def masked() -> torch.nn.Module:
    """Return a net that pools under its mask, in float64."""
    return seeded(lengthnets.MaskedMean).double()


masked.inputs = bert.inputs  # type: ignore[attr-defined]
