from __future__ import annotations

import torch
from torch import nn

from layertap.models import Batch, InputSpec, LoadedModel, Signature


class Recorder(nn.Module):
    """Returns its argument, whatever it is."""

    def forward(self, x: object) -> object:
        return x


def model(*, takes_list: bool) -> LoadedModel:
    """Return a loaded model that records what its module is given."""
    return LoadedModel(
        name="m",
        source="s",
        weights="w",
        module=Recorder(),
        device=torch.device("cpu"),
        signature=Signature((InputSpec((3, 4, 4), free=(1, 2), name="x"),)),
        takes_list=takes_list,
    )


def test_forward_passes_the_batch_on() -> None:
    """The module gets the batch object itself."""
    x = torch.rand(2, 3, 4, 4)

    assert model(takes_list=False).forward(Batch({"x": x})) is x


def test_forward_unbinds_for_modules_that_take_lists() -> None:
    """A detection module gets a list with each item of the batch, without the batch dimension."""
    x = torch.rand(2, 3, 4, 4)

    items = model(takes_list=True).forward(Batch({"x": x}))

    assert isinstance(items, list)
    assert [item.shape for item in items] == [(3, 4, 4)] * 2
    assert torch.equal(torch.stack(items), x)
