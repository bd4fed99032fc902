"""A model that runs in this process."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from layertap.description import LayerDescription, ModelDescription
from layertap.engine import (
    AudioFiles,
    Call,
    Engine,
    ExtractionRequest,
    ImageFiles,
    Inputs,
    ModelHost,
    TensorForm,
    TextBatch,
    describe,
)
from layertap.errors import UnavailableError
from layertap.inputs import encode_input
from layertap.intervention import InterventionsLike, parse_interventions
from layertap.local.features import LocalFeatures
from layertap.models import Signature
from layertap.objective import ObjectiveLike, parse_objective
from layertap.selection import Extractor, SelectionLike, as_extractor, parse_selections
from layertap.wire.dtypes import by_name, of_array
from layertap.wire.tensors import TensorView

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["LocalModel", "inputs_of"]


class LocalModel:
    """A model in this process, whose layers are captured exactly as a server does it.

    Names, selections, extractors, limits and errors are the same as on a server, and each plan is
    proven before it serves. Safe to share between threads. As a context manager it is closed at the
    end of the block. ``layertap.load`` makes it.

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
        """The model's inputs: the name, shape and dtype of each, and which dimensions may vary.

        Raises:
            UnavailableError: If the model is closed.
        """
        return self.host.model.signature

    @property
    def layers(self) -> dict[str, LayerDescription]:
        """The layers by name, in execution order: shapes, dtypes and which extractors serve them.

        Raises:
            UnavailableError: If the model is closed.
        """
        return {layer.name: layer for layer in self.describe().layers}

    def describe(self) -> ModelDescription:
        """Return a description of the model: its source, inputs, layers and how its passes run.

        Raises:
            UnavailableError: If the model is closed.
        """
        return describe(self.host)

    def fingerprint(self) -> str:
        """Return a digest of the model's modules and weights, its device and PyTorch's version.

        The first call reads all weights, about a second for each GiB.

        Raises:
            UnavailableError: If the model is closed.
        """
        return self.host.fingerprint()

    def extract(
        self,
        batch: InputLike,
        layers: SelectionLike,
        *,
        extractor: Extractor | str = Extractor.AUTO,
        objective: ObjectiveLike | None = None,
        interventions: InterventionsLike | None = None,
        variant: str = "",
        timeout: float | None = None,
    ) -> LocalFeatures:
        """Return layers of a batch from one forward pass, which stops as early as possible.

        Args:
            batch: A torch tensor or numpy array ``[B, ...]`` for the model (see ``signature``), or
                a mapping of input names to these; or an image, or a list of images. An image is a
                path, the bytes of a JPEG, PNG or WebP file, or a PIL image. A tensor on another
                device is copied to the CPU first. The model runs on a CPU tensor's own memory,
                without a copy, so don't write to it meanwhile.
            layers: The layers to return: ``"layer4"``, ``"layer*.0"``, ``"avgpool:input=before"``,
                a LayerSelection, a list of these, or a mapping of names to aliases.
            extractor: The extractor to use; AUTO chooses one for each request.
            objective: What the selections with GRADIENT or INPUT_GRADIENT, such as
                ``"layer4:gradient"``, are the gradients of: an `Objective`, or a text such as
                ``"fc[281]"`` or ``"fc[maximum]"``. The result then has ``objective.value`` too.
            interventions: Changes of values while the model runs: an `Intervention`, a text such as
                ``"layer4:channel=3:zero"``, a list of these, or a list of such lists, one for each
                set. The result then has ``interventions.elements`` and so on, too.
            variant: How the extractor's program is finished: one of ``describe().variants`` of the
                extractor, which must be named; empty for the usual way.
            timeout: Seconds that the extraction may take; None for no limit.

        Returns:
            The layers by name, as tensors that belong to the caller.

        Raises:
            InvalidInputError: If the model doesn't take such a batch or selection.
            LayerNotFoundError: If a name or glob matches no layer.
            ExtractorUnsupportedError: If the extractor can't serve a layer.
            ReplyTooLargeError: If the tensors would be larger than the limit.
            OverloadedError: If too many requests wait, or there is not enough memory.
            DeadlineExceededError: If the time is over.
            ModelRunError: If the model itself fails on this batch.
            UnavailableError: If the model is closed.
        """
        call = Call(timeout)
        selections = tuple(parse_selections(layers))
        for selection in selections:
            if selection.dtype:
                by_name(selection.dtype)
        chosen = as_extractor(extractor)
        aim = parse_objective(objective)
        changes = parse_interventions(interventions)
        given = inputs_of(batch)
        host = self.host
        extraction = self._engine.extract(
            ExtractionRequest(
                self.name, given, selections, chosen, aim, changes,
                variant=variant, form=TensorForm,
            ),
            call,
            host,
        )  # fmt: skip
        # Release the bytes now: the limit is for replies in transit, and the caller has this one.
        extraction.release()
        return LocalFeatures(
            extraction.payload, extraction.extractor, extraction.variant, extraction.timings
        )

    def close(self) -> None:
        """Finish running extractions, then free the model. Calling it again has no effect."""
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
        """Show the model's name and inputs."""
        if self._closed:
            return f"LocalModel({self.name!r}, closed)"
        taken = ", ".join(f"{each.name} {each.pattern}" for each in self.signature.inputs)
        return f"LocalModel({self.name!r}, takes {taken})"

    @property
    def host(self) -> ModelHost:
        """The engine's host of the model, for layertap's own tools.

        Raises:
            UnavailableError: If the model is closed.
        """
        if self._closed:
            raise UnavailableError(f"model {self.name!r} is closed")
        return self._engine.host(self.name)


def inputs_of(batch: InputLike) -> Inputs:
    """Convert a caller's input to the engine's form; see ``encode_input`` for errors."""
    given = encode_input(batch)
    return Inputs(
        tuple(_view(name, array) for name, array in given.arrays),
        tuple(ImageFiles(files, name) for name, files in given.images),
        tuple(TextBatch(tuple(texts.texts), texts.options, name) for name, texts in given.texts),
        tuple(AudioFiles(audio.encoded, name) for name, audio in given.audio),
    )


def _view(name: str, array: np.ndarray) -> TensorView:
    dtype = of_array(array)
    # Read-only memory, such as a mapped file's, may really not be writable. A model that writes to
    # its input would then end the process.
    dense = np.require(array, requirements=["C", "W"])
    data = memoryview(dense.reshape(-1).view(np.uint8)) if dense.size else memoryview(b"")
    return TensorView(name, dtype, array.shape, data)
