"""TORCH_EXPORT: the tapped model exported by torch.export.

The file that test_sixth_kind.py adds to a copy of the package, as CONTRIBUTING says. It takes
outputs that are plain tensors, to show how what it does not take is refused.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.kinds.base import BuildContext, CompiledKind, Take, cloned
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import Sink
from layertap.models import Batch, LoadedModel
from layertap.selection import Extractor

__all__ = ["KIND", "TorchExportKind"]


class _Tapped(nn.Module):
    """A module whose ``forward`` returns what ``take`` makes of the captured values."""

    def __init__(self, context: BuildContext, pass_spec: PassSpec, take: Take) -> None:
        super().__init__()
        self.module = context.model.module
        self._run = context.taps.run
        self._forward = context.model.forward
        self._points = pass_spec.points
        self._name = context.model.signature.main.name
        self._take = take

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model under its taps, to its end: export can't follow a pass that stops early."""
        captured: dict[int, tuple[torch.Tensor, ...]] = {}

        def keep(index: int, value: torch.Tensor) -> None:
            captured[index] = self._take(index, value)

        batch = Batch({self._name: x})
        self._run(self._forward, batch, self._points, keep, to_end=True)
        return tuple(part for index in range(len(self._points)) for part in captured[index])


class _Exported:
    """Runs an exported program."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        for index, value in enumerate(self._run(x.only)):
            sink(index, value)


class TorchExportKind(CompiledKind[torch.export.ExportedProgram]):
    """Serves a layer set with an exported program, which has the model's own operations."""

    id = Extractor.TORCH_EXPORT

    def warm_up_runs(self, device: torch.device) -> int:
        """See ExtractorKind."""
        del device
        return 1

    def tolerance(self, reference: torch.Tensor) -> float:
        """See ExtractorKind; nothing is fused or folded."""
        return 0.0

    def compile(
        self,
        context: BuildContext,
        pass_spec: PassSpec,
        example: Batch,
        take: Take = cloned,
        *,
        copies_weights: bool = True,
    ) -> torch.export.ExportedProgram:
        """See CompiledKind; an example of one item would make the batch size a constant."""
        del copies_weights  # It never copies them.
        tapped = _Tapped(context, pass_spec, take)
        tapped.training = False
        x = Batch.cat([example, example]).only
        sizes = ({0: torch.export.Dim("batch")},)
        return torch.export.export(tapped, (x,), dynamic_shapes=sizes, strict=False)

    def run(self, program: torch.export.ExportedProgram, x: Batch) -> Values:
        """See CompiledKind."""
        return list(program.module()(x.only))

    def finish(
        self, program: torch.export.ExportedProgram, typical: Batch | None = None, variant: str = ""
    ) -> BuiltExtractor:
        """See CompiledKind."""
        return _Exported(program.module())

    def save(self, program: torch.export.ExportedProgram) -> memoryview:
        """See CompiledKind."""
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getbuffer()

    def load(self, path: Path, model: LoadedModel) -> torch.export.ExportedProgram:
        """See CompiledKind."""
        return torch.export.load(path)


KIND = TorchExportKind()
