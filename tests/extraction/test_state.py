"""A snapshot finds differences and restores them."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layertap.extraction.state import Snapshot, Watch, walk
from layertap.extraction.symbolic import as_it_was
from layertap.extraction.writes import each_line
from layertap.models import ModelSpec, load_model
from statefulnets import ReadOnly
from tinynets import ITEM


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("empty", "value")

    def __init__(self) -> None:
        self.value = 1


def holder() -> Any:
    """Return a module that holds one object of each kind."""
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_buffer("buffer", torch.zeros(3))
    held = SimpleNamespace(
        number=1, items=[1], queue=deque([1], maxlen=4), names={"a"}, order=OrderedDict(a=1, b=2),
        frozen=ReadOnly(a=1), slotted=Slotted(), array=np.zeros(3), raw=bytearray(b"abc"),
        chance=random.Random(0), draws=torch.Generator().manual_seed(0), lock=threading.Lock(),
        numpy=np.random.default_rng(0), view=net.buffer[1:], local=threading.local(), nan=np.nan,
    )  # fmt: skip
    held.itself = held
    vars(net)["held"] = held
    return net


WRITES = {
    "number": lambda net: setattr(net.held, "number", 2),
    "items": lambda net: net.held.items.append(2),
    "queue": lambda net: net.held.queue.append(2),
    "names": lambda net: net.held.names.add("b"),
    "order": lambda net: net.held.order.move_to_end("a"),
    "frozen": lambda net: dict.__setitem__(net.held.frozen, "a", 2),
    "slotted": lambda net: setattr(net.held.slotted, "empty", 2),
    "array": lambda net: net.held.array.__iadd__(1),
    "raw": lambda net: net.held.raw.__setitem__(0, 0),
    "chance": lambda net: net.held.chance.random(),
    "draws": lambda net: torch.rand(1, generator=net.held.draws),
    "numpy": lambda net: net.held.numpy.random(),
    "lock": lambda net: net.held.lock.acquire(),
    "view": lambda net: net.held.view.add_(1),
    "local": lambda net: setattr(net.held.local, "x", 1),
    "new attribute": lambda net: setattr(net, "fresh", []),
    "buffer": lambda net: net.buffer.add_(1),
    "another buffer": lambda net: setattr(net, "buffer", torch.ones(3)),
    "other memory": lambda net: setattr(net[0].weight, "data", torch.ones(2, 2)),
    "uncounted": lambda net: net[0].weight.data.add_(1),
    "mode": lambda net: net.train(),
    "hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "child": lambda net: net.add_module("more", nn.ReLU()),
}


@pytest.mark.parametrize("name", WRITES)
def test_each_write_is_seen_and_put_back(name: str) -> None:
    """This holds for everything that holds it, and every way to write it."""
    with torch.inference_mode(False), torch.no_grad():
        net = holder().eval()
        snapshot = Snapshot(net)
        assert snapshot.deep_changes() == []
        WRITES[name](net)
        assert snapshot.deep_changes()
        assert all(not change.reason for change in snapshot.deep_changes())
        snapshot.deep_restore()
        assert snapshot.deep_changes() == []


@pytest.mark.parametrize(
    "other",
    [lambda data: data + 1, lambda data: data.view(3, 1), lambda data: data.view(torch.int32)],
    ids=["memory", "shape", "dtype"],
)
def test_other_data_of_a_tensor_is_seen_at_once(
    other: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Assigning ``data`` counts as no write, so its place, shape and dtype are looked at."""
    with torch.inference_mode(False), torch.no_grad():
        net = holder()
        snapshot = Snapshot(net)
        version = net.buffer._version
        net.buffer.data = other(net.buffer.data)
        assert net.buffer._version == version
        assert "buffer" in {change.path for change in snapshot.changes()}
        snapshot.restore()
        assert snapshot.changes() == []
        assert torch.equal(net.buffer, torch.zeros(3))


def test_equal_values_are_no_change() -> None:
    """A weight that is computed again, or a list that is built again, changes nothing visible."""
    net = holder()
    vars(net).update(weight=torch.ones(2), sizes=[(1, 2)], seen={"a": np.nan})
    snapshot = Snapshot(net)
    vars(net).update(weight=torch.ones(2), sizes=[(1, 2)], seen={"a": float("nan")})
    assert snapshot.changes() == []


def test_what_has_no_way_back_says_why() -> None:
    """An iterator can't be rewound."""
    net = holder()
    vars(net)["numbers"] = iter([1, 2, 3])
    snapshot = Snapshot(net)
    next(net.numbers)
    (change,) = snapshot.changes()
    assert change.path == "numbers"
    assert "rewound" in change.reason


def test_settling_keeps_the_copies_of_what_passes_write() -> None:
    """A tensor that was seen to change is read each time; other parameters lose their copy."""
    with torch.inference_mode(False), torch.no_grad():
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        before = net[1].weight.clone()
        snapshot = Snapshot(net)
        snapshot.settle(["1.weight"])
        net[1].weight.data.add_(1)
        snapshot.restore()
        assert torch.equal(net[1].weight, before)
        net[0].weight.add_(1)
        assert [change.path for change in snapshot.changes()] == ["0.weight"]
        assert snapshot.changes()[0].reason


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight.data.add_(1),
        lambda weight: setattr(weight, "data", weight.data + 1),
    ],
    ids=["counted", "uncounted", "other memory"],
)
def test_each_write_to_large_weights_is_seen(
    write: Callable[[torch.Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no copy, so a write can't be undone; it is reported once."""
    monkeypatch.setattr(walk, "PARAMETER_BYTES", 16)
    with torch.inference_mode(False), torch.no_grad():
        net = holder()
        snapshot = Snapshot(net)
        assert snapshot.deep_changes() == []
        for _ in range(2):
            write(net[0].weight)
            (change,) = snapshot.deep_changes()
            assert (change.path, change.reason) == ("0.weight", "no copy of this tensor was kept")
            now = net[0].weight.clone()
            snapshot.deep_restore()
            assert snapshot.deep_changes() == []
            assert torch.equal(net[0].weight, now)


def test_a_write_to_a_buffer_beside_large_weights_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Buffers are small, so they are copied in any case."""
    monkeypatch.setattr(walk, "PARAMETER_BYTES", 16)
    with torch.inference_mode(False), torch.no_grad():
        net = holder()
        snapshot = Snapshot(net)
        net.buffer.data.add_(1)
        assert {change.reason for change in snapshot.deep_changes()} == {""}
        snapshot.deep_restore()
        assert torch.equal(net.buffer, torch.zeros(3))


def test_a_watch_sees_what_is_taken_back_between_two_lines() -> None:
    """No module is called in between, and nothing is left at the end."""
    net = holder()

    def forward() -> None:
        net.held.items.append(2)
        net.held.items.pop()

    watch = Watch(Snapshot(net))
    with each_line(watch.look_at):
        forward()
    assert list(watch.changes) == ["held.items"]


def written(net: nn.Module, scale: torch.Tensor) -> None:
    net.held.items += [scale]
    scale = scale + 1
    del net.held.items[-1]


def called_by_another_name(net: nn.Module, scale: torch.Tensor) -> None:
    push, take = net.held.items.append, net.held.items.pop
    push(scale)
    scale = scale + 1
    take()


def called_with_unpacked_arguments(net: nn.Module, scale: torch.Tensor) -> None:
    given = [scale]
    net.held.items.append(*given)
    scale = scale + 1
    net.held.items.pop(*[])


def changed_in_place(net: nn.Module, scale: torch.Tensor) -> None:
    net.other = None
    items = net.held.items
    items += [scale]
    scale = scale + 1
    items[:] = items[:-1]


def raised_in_between(net: nn.Module, scale: torch.Tensor) -> None:
    try:
        net.held.items.append(scale)
        raise ValueError
    except ValueError:
        net.held.items.pop()


def written_by_the_last_line(net: nn.Module, scale: torch.Tensor) -> None:
    def inner() -> None:
        net.held.items.append(scale)

    inner()
    net.held.items.pop()


@pytest.mark.parametrize(
    "forward",
    [written, called_by_another_name, called_with_unpacked_arguments, changed_in_place,
     raised_in_between, written_by_the_last_line],
)  # fmt: skip
def test_a_watch_looks_after_every_way_to_write(forward) -> None:
    """Whatever statement writes, the state is compared before the next one takes it back."""
    net = holder()
    watch = Watch(Snapshot(net))
    with each_line(watch.look_at):
        forward(net, torch.ones(1))
    assert "held.items" in watch.changes


def test_a_watch_does_not_look_after_lines_that_only_compute() -> None:
    """Comparing takes far longer than such a line."""
    net, looks = holder(), []

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x.relu()
        x = torch.cat(
            [x, x],
            dim=0,
        )
        net.other = None
        return x * 2

    with each_line(looks.append):
        forward(torch.ones(1))
    assert looks == [None]


def test_a_watch_of_a_large_model_sees_what_its_modules_write_themselves(monkeypatch) -> None:
    """This works although there is no time to compare all of it at each line."""
    monkeypatch.setattr("layertap.extraction.state.watch.SMALL_NODES", 0)

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.append(1)
            self.kept.pop()
            return x

    net = nn.Sequential(nn.Identity(), Keeps())
    watch = Watch(Snapshot(net))
    watch._next = float("inf")
    with each_line(watch.look_at):
        net(torch.zeros(1))
    assert list(watch.changes) == ["1.kept"]


def test_modules_that_are_not_registered_are_found() -> None:
    """Nothing that torch does to a model's modules reaches them."""
    net = holder()
    vars(net)["parts"] = [nn.Linear(1, 1)]
    assert Snapshot(net).outside == ("parts[0]",)


def test_modes_and_weights_survive_symbolic_tracing() -> None:
    """This holds whatever the model's own ``train`` does, and for read-only attributes."""

    class Merges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.1]))
            self.config = ReadOnly(a=1)

        def train(self, mode: bool = True) -> Any:
            self.weight.data += 0.3 if mode else -0.3
            return super().train(mode)

    net = Merges()
    vars(net)["training"] = False
    before = net.weight.detach().clone()

    def fails() -> None:
        with as_it_was(net):
            net.train()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not net.training
    assert torch.equal(net.weight, before)
    assert "train" not in vars(net)


def test_every_module_is_loaded_in_evaluation_mode(monkeypatch, caplog) -> None:
    """This holds even if the model's own ``train`` returns nothing and leaves a dropout on."""
    model = load_model(ModelSpec("statefulnets:OwnModes", item_shape=ITEM))
    assert not any(part.training for part in model.module.modules())
    assert "drop" in caplog.text
