"""The leaves of the arguments of operations are those that torch itself finds."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutput

from layertap.extraction.leaves import leaves

Pair = namedtuple("Pair", ["first", "second"])
X, Y, W = torch.zeros(1), torch.ones(1), nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    "values",
    [
        X,
        None,
        ((X, [Y, 1, None], {"dim": -1, "out": (W,)}), {"dtype": torch.float32}),
        [OrderedDict(b=X, a=Y), Pair(X, (Y, "text"))],
        (BaseModelOutput(last_hidden_state=X, hidden_states=(Y, W)), slice(1, 2)),
        ((), [], {}),
    ],
)
def test_they_are_those_of_torch(values) -> None:
    """Plain containers, others, and none at all: the same objects in the same order."""
    found, expected = leaves(values), tree_leaves(values)
    assert len(found) == len(expected)
    assert all(one is other for one, other in zip(found, expected, strict=True))
