"""CUDA graphs: a pass's kernels, recorded once at a batch size and launched as one.

At batch 1 a GPU is often done with a kernel before the host has launched the next. A graph has the
launches after it: replaying one costs the host microseconds, whatever extractor was recorded.

Note [What a graph holds]
    The addresses of its input and of its values, which are its own: an input is copied in before a
    replay, and a sink copies the values out, on the same stream, before the next replay overwrites
    them. The kernels that this input's values led to: so a model that looks at values can't be
    recorded (to look is to wait for the device, which a recording refuses), and one that keeps
    state in Python would keep none. What the host does between layers, such as noticing that
    nobody waits any more, it does not do in a replay.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.points import CapturePoint, Sink
from layertap.extraction.proof import collect
from layertap.models import Batch

__all__ = ["GraphedExtractor"]

Shapes = tuple[tuple[int, ...], ...]
"""Those of a batch's tensors."""

_recording = threading.Lock()
"""PyTorch records one graph at a time in a process; each device has a compute thread of its own."""

_WARM_UP_RUNS = 3
"""Runs before a recording, in which libraries make what they keep; PyTorch's own number."""


class GraphedExtractor:
    """Replays an extractor's passes at recorded shapes, and runs it at any other.

    Args:
        built: The extractor.
        points: What it captures.
    """

    def __init__(self, built: BuiltExtractor, points: Sequence[CapturePoint]) -> None:
        self._built = built
        self._points = points
        self._recorded: dict[Shapes, _Recording] = {}

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        recording = self._recorded.get(x.shapes)
        if recording is None:
            self._built.run(x, sink)
            return
        for index, value in enumerate(recording.replay(x)):
            sink(index, value)

    def record(self, x: Batch) -> None:
        """Record a pass at the shapes of a batch; raise RuntimeError where it can't be recorded."""
        self._recorded[x.shapes] = _Recording(self._built, self._points, x)

    def forget(self, shapes: Shapes) -> None:
        """Run the extractor itself at these shapes again."""
        self._recorded.pop(shapes, None)


class _Recording:
    """One graph, with its input and its values."""

    def __init__(self, built: BuiltExtractor, points: Sequence[CapturePoint], x: Batch) -> None:
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        with _recording, torch.cuda.device(next(iter(x.values())).device):
            before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(before)
            # Around the recording too: one that fails leaves its stream as the current one.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    collect(built, points, self._x)
                # Other threads may call CUDA meanwhile, as those do that wait for a copy.
                mode = "thread_local"
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode=mode):
                    self._values = collect(built, points, self._x)
            before.wait_stream(stream)

    def replay(self, x: Batch) -> Values:
        """Return the values for a batch of the recorded shape; the next replay overwrites them."""
        for name, tensor in self._x.items():
            tensor.copy_(x[name])
        self._graph.replay()
        return self._values
