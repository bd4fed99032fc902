"""CUDA graphs: the kernels of a pass at one batch size, recorded once and launched together.

At batch size 1 a GPU often finishes a kernel before the host has launched the next one. A graph
avoids these gaps: replaying it costs the host microseconds, whichever extractor was recorded.

Note [What a graph holds]
    A graph holds the addresses of its own input and values. An input is copied in before a replay,
    and a sink copies the values out, on the same stream, before the next replay overwrites them.

    A graph also holds the kernels that ran for the recorded input. So a model whose control flow
    depends on values can't be recorded (reading a value waits for the device, which a recording
    forbids), and a model that keeps state in Python would not update it. A replay also skips what
    the host does between layers, such as noticing that no client waits any more.

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
"""The shapes of a batch's tensors."""

_recording = threading.Lock()
"""PyTorch records one graph at a time per process, but each device has its own compute thread."""

_WARM_UP_RUNS = 3
"""Number of runs before a recording, in which libraries allocate memory. PyTorch uses the same."""


class GraphedExtractor:
    """Replays the recorded passes of an extractor; runs the extractor at shapes not recorded.

    Args:
        built: The extractor.
        points: The points that it captures.
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
        """Record a pass at the shapes of a batch; raise RuntimeError if it can't be recorded."""
        self._recorded[x.shapes] = _Recording(self._built, self._points, x)

    def forget(self, shapes: Shapes) -> None:
        """Drop the recording at these shapes, so that the extractor itself runs again."""
        self._recorded.pop(shapes, None)


class _Recording:
    """One graph with its input and its values."""

    def __init__(self, built: BuiltExtractor, points: Sequence[CapturePoint], x: Batch) -> None:
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        with _recording, torch.cuda.device(x.device):
            before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(before)
            # This block encloses the recording: if it fails, it leaves its stream as the current.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    collect(built, points, self._x)
                # Other threads may call CUDA meanwhile, such as those that wait for a copy.
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
