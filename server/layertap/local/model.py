"""A model that runs in this process."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from layertap.description import LayerDescription, ModelDescription
from layertap.engine import (
    Call,
    Engine,
    ExtractionRequest,
    ImageFiles,
    Inputs,
    ModelHost,
    TensorForm,
    describe,
)
from layertap.errors import UnavailableError
from layertap.inputs import encode_input
from layertap.local.features import LocalFeatures
from layertap.models import Signature
from layertap.selection import Extractor, SelectionLike, as_extractor, parse_selections
from layertap.wire.dtypes import by_name, of_array
from layertap.wire.tensors import TensorView

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["LocalModel", "inputs_of"]


class LocalModel:
    """A model in this process, whose layers are taken as a server takes them.

    Names, selections, extractors, limits and errors are those of a server; so is the proof of each
    way to take a layer before it serves. Safe to share between threads. As a context manager it is
    closed at the end of the block. Made by ``layertap.load``.

    Attributes:
        name: The model's name.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.name = name
        self._engine = engine
        self._closing = threading.Lock()
        self._closed = False

    @property
    def signature(self) -> Signature:
        """What the model takes: the name, shape and dtype of each input, and what may vary.

        Raises:
            UnavailableError: Where the model is closed.
        """
        return self.host.model.signature

    @property
    def layers(self) -> dict[str, LayerDescription]:
        """The layers by name, in execution order: shapes, dtypes and which extractors serve them.

        Raises:
            UnavailableError: Where the model is closed.
        """
        return {layer.name: layer for layer in self.describe().layers}

    def describe(self) -> ModelDescription:
        """Return what is known of the model: its source, inputs, layers and how its passes run.

        Raises:
            UnavailableError: Where the model is closed.
        """
        return describe(self.host)

    def extract(
        self,
        batch: InputLike,
        layers: SelectionLike,
        *,
        extractor: Extractor | str = Extractor.AUTO,
        timeout: float | None = None,
    ) -> LocalFeatures:
        """Return layers of a batch from one forward pass, which stops as early as it can.

        Args:
            batch: A torch tensor or numpy array ``[B, ...]`` as the model takes it
                (``signature``), or a mapping of input names to such; or an image, or a list of
                images: a path, the bytes of a JPEG, PNG or WebP file, or a PIL image. A tensor on
                another device is copied to the CPU first. The model runs on a CPU tensor's own
                memory, without a copy, so don't write to it meanwhile.
            layers: What to return: ``"layer4"``, ``"layer*.0"``, ``"avgpool:input=before"``, a
                LayerSelection, a list of these, or a mapping of names to aliases.
            extractor: How to take them; AUTO chooses for each request.
            timeout: Seconds that it may take; None for no end.

        Returns:
            The layers by name, as tensors of the caller's own.

        Raises:
            InvalidInputError: For a batch or a selection that the model does not take.
            LayerNotFoundError: For a name or glob that matches no layer.
            ExtractorUnsupportedError: For a layer that the extractor can't serve.
            ReplyTooLargeError: Where the tensors would be larger than the limit.
            OverloadedError: Where too many requests wait, or there is not the memory.
            DeadlineExceededError: Where the time ran out.
            ModelRunError: Where the model itself fails on this batch.
            UnavailableError: Where the model is closed.
        """
        call = Call(timeout)
        selections = tuple(parse_selections(layers))
        for selection in selections:
            if selection.dtype:
                by_name(selection.dtype)
        chosen = as_extractor(extractor)
        given = inputs_of(batch)
        host = self.host
        extraction = self._engine.extract(
            ExtractionRequest(self.name, given, selections, chosen, form=TensorForm), call, host
        )
        # The limit of bytes is for what is on its way; the tensors are the caller's from now on.
        extraction.release()
        return LocalFeatures(extraction.payload, extraction.extractor, extraction.timings)

    def close(self) -> None:
        """Finish what runs, then free the model. More calls of it do nothing."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._engine.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Show the name, and what the model takes."""
        if self._closed:
            return f"LocalModel({self.name!r}, closed)"
        taken = ", ".join(f"{each.name} {each.pattern}" for each in self.signature.inputs)
        return f"LocalModel({self.name!r}, takes {taken})"

    @property
    def host(self) -> ModelHost:
        """The engine's own side of the model, for tools of layertap's.

        Raises:
            UnavailableError: Where the model is closed.
        """
        if self._closed:
            raise UnavailableError(f"model {self.name!r} is closed")
        return self._engine.host(self.name)


def inputs_of(batch: InputLike) -> Inputs:
    """Return what the engine takes for what a caller gave; errors as ``encode_input``."""
    given = encode_input(batch)
    return Inputs(
        tuple(_view(name, array) for name, array in given.arrays),
        tuple(ImageFiles(files, name) for name, files in given.images),
    )


def _view(name: str, array: np.ndarray) -> TensorView:
    dtype = of_array(array)
    # Read-only memory may not be writable at all, such as a mapped file's, and a model that writes
    # into its input would end the process.
    dense = np.require(array, requirements=["C", "W"])
    data = memoryview(dense.reshape(-1).view(np.uint8)) if dense.size else memoryview(b"")
    return TensorView(name, dtype, array.shape, data)
