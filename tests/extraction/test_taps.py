"""Taps capture what a module returned or received, and change nothing else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from layertap.errors import ModelRunError
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.taps import Taps
from layertap.selection import Capture
from oddnets import tries
from oracle import inputs_of, outputs_of
from tinynets import ITEM, residual


def point(path: str, capture: Capture = Capture.OUTPUT, call: int = 0) -> CapturePoint:
    return CapturePoint(PointKind.MODULE, path, capture, call)


def run(taps: Taps, net: torch.nn.Module, x: torch.Tensor, *points: CapturePoint) -> list:
    seen: dict[int, torch.Tensor] = {}
    taps.run(net, x.clone(), points, lambda i, value: seen.__setitem__(i, value.clone()))
    return [seen[i] for i in range(len(points))]


def test_value_before_a_later_in_place_operation() -> None:
    """An output is what the module returned, not what an in-place ReLU made of it afterwards."""
    net, x = residual(), torch.randn(2, *ITEM)
    bn1, layer1 = run(Taps(net), net, x, point("bn1"), point("layer1"))
    naive: dict[str, torch.Tensor] = {}
    handle = net.bn1.register_forward_hook(lambda m, i, o: naive.update(bn1=o))
    net(x.clone())
    handle.remove()
    assert torch.equal(bn1, outputs_of(net, x, "bn1")[0])
    assert torch.equal(layer1, outputs_of(net, x, "layer1")[0])
    assert not torch.equal(naive["bn1"], bn1), "the naive hook should show the mutated value"


def test_input_is_read_before_the_module_runs() -> None:
    """An input is what the module received, even if the module overwrites it."""
    net, x = residual(), torch.randn(2, *ITEM)
    (relu_input,) = run(Taps(net), net, x, point("relu", Capture.INPUT))
    assert torch.equal(relu_input, inputs_of(net, x, "relu")[0])
    assert (relu_input < 0).any()


def test_each_call_of_a_module_is_its_own_point() -> None:
    """A module that runs twice has two values, distinguished by the number of the call."""
    net, x = residual(), torch.randn(1, *ITEM)
    values = run(Taps(net), net, x, *(point("layer1.0.relu", call=call) for call in (0, 1)))
    assert all(map(torch.equal, values, outputs_of(net, x, "layer1.0.relu")))
    assert not torch.equal(*values)


def test_the_pass_stops_after_the_last_capture() -> None:
    """No layer after the last requested one runs."""
    net, x = residual(), torch.randn(1, *ITEM)
    ran: list[str] = []
    for name in ("layer1", "layer2", "fc"):
        net.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    run(Taps(net), net, x, point("layer1"))
    assert ran == ["layer1"]


def test_a_call_that_does_not_happen_is_an_error() -> None:
    """A forward pass that ends without a capture raises instead of returning less."""
    net = residual()
    with pytest.raises(ModelRunError, match="'fc'"):
        run(Taps(net), net, torch.randn(1, *ITEM), point("fc", call=5))


def test_hooks_are_installed_once() -> None:
    """Repeated requests for a layer leave one hook on it."""
    net = residual()
    taps = Taps(net)
    for _ in range(5):
        run(taps, net, torch.randn(1, *ITEM), point("layer1"), point("bn1", Capture.INPUT))
    assert len(net.layer1._forward_hooks) == 1
    assert len(net.bn1._forward_pre_hooks) == 1


def test_close_removes_every_hook() -> None:
    """A model that is closed is as it was before."""
    net = residual()
    taps = Taps(net)
    run(taps, net, torch.randn(1, *ITEM), point("layer1"), point("bn1", Capture.INPUT))
    taps.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_pass_outside_a_session_captures_nothing() -> None:
    """A forward pass by other code is neither captured nor changed."""
    net, x = residual(), torch.randn(1, *ITEM)
    before = net(x.clone())
    run(Taps(net), net, x, point("layer1"))
    assert torch.equal(net(x.clone()), before)


def test_a_failing_sink_leaves_no_session_behind() -> None:
    """After an error in a sink, the next session sees only its own values."""
    net, x = residual(), torch.randn(1, *ITEM)
    taps = Taps(net)

    def fail(index: int, value: torch.Tensor) -> None:
        raise KeyError("sink")

    with pytest.raises(KeyError, match="sink"):
        taps.run(net, x.clone(), [point("bn1")], fail)
    calls: list[int] = []
    net(x.clone())
    taps.run(net, x.clone(), [point("layer1")], lambda i, value: calls.append(i))
    assert calls == [0]


def test_sessions_of_several_threads_do_not_mix() -> None:
    """Threads that run one model at once with different layers each get their own values.

    The counter-example registers its hooks per request, and sees other requests' activations.
    """
    net = residual()
    taps = Taps(net)
    paths = ("bn1", "layer1", "layer2.1.bn2", "avgpool")
    inputs = [torch.randn(1, *ITEM) for _ in range(40)]
    expected = {(i, p): outputs_of(net, x, p)[0] for i, x in enumerate(inputs) for p in paths}
    together = threading.Barrier(4)

    def ask(worker: int) -> int:
        wrong = 0
        with torch.inference_mode():
            together.wait()
            for i, x in enumerate(inputs):
                path = paths[(i + worker) % len(paths)]
                (value,) = run(taps, net, x, point(path))
                wrong += not torch.equal(value, expected[i, path])
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [0, 0, 0, 0]


def test_what_a_model_catches_is_raised_at_the_end() -> None:
    """A sink's refusal is not lost if the model catches it and continues."""

    def refuse(index: int, value: torch.Tensor) -> None:
        raise ModelRunError("refused")

    net = tries()
    with pytest.raises(ModelRunError, match="^refused$"):
        Taps(net).run(net, torch.rand(1, *ITEM), [point("conv"), point("tail")], refuse)
