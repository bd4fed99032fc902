"""A program whose native code could end the process runs in another process first."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from batches import batch_for, key_for
from layertap.errors import ExtractorUnsupportedError
from layertap.extraction import CapturePoint, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.apart import ProgramEndedError, may_end_the_process, run_apart
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.proof import collect
from layertap.extraction.trial import tried
from layertap.extraction.verify import mismatch
from layertap.models import Batch, LoadedModel, ModelSpec, load_model
from layertap.selection import Extractor
from layertap.silence import warnings_ignored
from oracle import outputs_of

IDS = (12,)


class OfOne(nn.Module):
    """An LSTM that begins with a state for a batch of one, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        h = torch.zeros(1, 1, 64)
        state = (h, h)
        return (self.rnn(x, state)[0],)


def frozen(module: nn.Module, x: torch.Tensor) -> torch.jit.ScriptModule:
    with torch.inference_mode(), warnings_ignored():
        traced = torch.jit.trace(module.eval(), (x,), check_trace=False)
        return torch.jit.freeze(traced)


def finished(steps):
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return ended.value


def builder(net: str) -> tuple[PlanBuilder, LoadedModel]:
    model = tried(load_model(ModelSpec(f"proofnets:{net}", item_shape=IDS)))
    return PlanBuilder(model, Taps(model.module), measure(model)), model


def test_an_ordinary_recurrent_model_is_compiled() -> None:
    """Its program is right in the child, and then in this process."""
    plans, model = builder("recurrent")
    point = CapturePoint(PointKind.MODULE, "head")
    plan = plans.build(Extractor.TORCHSCRIPT, PassSpec((point,)), key_for(model, IDS))
    ids = torch.randint(0, 100, (5, *IDS))
    [value] = collect(plan.built, [point], batch_for(plan, ids))
    assert not mismatch(value, outputs_of(model.module, ids, "head")[0], 1e-4)


def test_a_program_with_the_state_of_another_batch_size_never_runs_here() -> None:
    """The native code writes past the state's end, or gives another shape: both are refused."""
    plans, model = builder("fixed_state")
    point = CapturePoint(PointKind.MODULE, "rnn", member=("0",))
    with pytest.raises(ExtractorUnsupportedError, match=r"its program fails|at batch size"):
        plans.build(Extractor.TORCHSCRIPT, PassSpec((point,)), key_for(model, IDS))


def test_a_child_that_dies_is_reported(monkeypatch) -> None:
    """A signal that ends the child is an error with the signal's name; this process continues."""
    monkeypatch.setattr(
        "layertap.extraction.apart._CHILD",
        "import os, signal; os.kill(os.getpid(), signal.SIGABRT)",
    )
    x = torch.rand(3, 1, 4)
    with pytest.raises(ProgramEndedError, match="SIGABRT"):
        finished(run_apart(frozen(OfOne(), x), [Batch({"x": x})], torch.device("cpu"), 1))


PARENT = """
import io, os, torch
written = io.BytesIO()
torch.save([[torch.tensor(os.getppid())]], written)
with open(1, "wb") as answer:
    answer.write(written.getvalue())
"""


def parent_of_a_child(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the process that forked the child of a run."""
    monkeypatch.setattr("layertap.extraction.apart._CHILD", PARENT)
    x = torch.rand(3, 1, 4)
    [[parent]] = finished(run_apart(frozen(OfOne(), x), [], torch.device("cpu"), 1))
    return int(parent)


def is_running(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_one_helper_forks_the_children_of_several_runs(monkeypatch) -> None:
    """It survives a child that dies, and ends when it was not used for a while."""
    monkeypatch.setattr("layertap.extraction.apart._IDLE_SECONDS", 600)
    first = parent_of_a_child(monkeypatch)
    assert first != os.getpid()
    test_a_child_that_dies_is_reported(monkeypatch)
    monkeypatch.setattr("layertap.extraction.apart._IDLE_SECONDS", 0.1)
    assert parent_of_a_child(monkeypatch) == first
    ends = time.monotonic() + 30
    while is_running(first) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not is_running(first)
    assert parent_of_a_child(monkeypatch) not in (first, os.getpid())


def test_a_run_that_is_given_up_leaves_no_process(monkeypatch) -> None:
    """Closing the steps of a run ends its child and the helper that forked it."""
    helper = parent_of_a_child(monkeypatch)
    monkeypatch.setattr(
        "layertap.extraction.apart._CHILD", "import time; open(1, 'w').write('x'); time.sleep(600)"
    )
    x = torch.rand(3, 1, 4)
    steps = run_apart(frozen(OfOne(), x), [], torch.device("cpu"), 1)
    children = Path(f"/proc/{helper}/task/{helper}/children")
    ends = time.monotonic() + 30
    while time.monotonic() < ends and not children.read_text():
        next(steps)
    (child,) = map(int, children.read_text().split())
    steps.close()
    assert not is_running(helper)
    ends = time.monotonic() + 30
    while is_running(child) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not is_running(child)


class Returns(nn.Conv2d):
    """A convolution that returns a tuple, like the program of a layer set."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (super().forward(x),)


@pytest.mark.long
def test_a_child_that_raises_is_reported() -> None:
    """The last line of its error is passed on."""
    program = frozen(Returns(3, 4, 1), torch.rand(1, 3, 4, 4))
    with pytest.raises(ProgramEndedError, match="RuntimeError: .*channels"):
        finished(run_apart(program, [Batch({"x": torch.rand(1, 5, 4, 4)})], torch.device("cpu"), 1))


def test_only_unchecked_operations_need_a_process_of_their_own() -> None:
    """Convolutions and linear layers check their arguments; recurrent layers don't."""
    checked = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    assert not may_end_the_process(frozen(checked, torch.rand(1, 3, 4, 4)))
    assert may_end_the_process(frozen(OfOne(), torch.rand(3, 1, 4)))
