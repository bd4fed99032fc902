"""Converts a request's recordings to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from layertap.call import Call
from layertap.engine.batch import AudioFiles, Inputs
from layertap.errors import InvalidInputError
from layertap.models import LoadedModel
from layertap.models.audio import AudioProcessor, decode_audio
from layertap.settings import Limits

__all__ = ["audio_tensors", "decode_recordings"]


def decode_recordings(
    model: LoadedModel,
    given: AudioFiles,
    limits: Limits,
    call: Call,
    admit: Callable[[int], object] = lambda nbytes: None,
) -> list[np.ndarray]:
    """Decode a batch of recordings. It doesn't use PyTorch, so any thread may call it.

    Args:
        model: The model that takes them.
        given: The files.
        limits: The limits of requests.
        call: The deadline and cancellation state of the request.
        admit: Called with the bytes of each decoded recording; may raise OverloadedError.

    Raises:
        InvalidInputError: As ``decode_audio`` and ``AudioProcessor.check``.
        DeadlineExceededError, CancelledError: If the caller no longer waits.
    """
    processor = _processor(model)
    left, waveforms = limits.audio_samples, []
    for index, file in enumerate(given.files):
        call.check()
        waveforms.append(decode_audio(file, index, processor.rate, left, admit))
        left -= len(waveforms[-1])
    processor.check(waveforms)
    return waveforms


def audio_tensors(
    model: LoadedModel, name: str, given: Inputs, waveforms: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    """Return the tensors that are made of recordings: of an input, and the mask if there is one.

    Call this on a compute thread only.

    Raises:
        InvalidInputError: The request has a tensor that is made of the recordings, or the model
            doesn't take a tensor of that shape.
    """
    made = _processor(model).run(list(waveforms))
    _check_not_sent(made, name, given)
    tensors = {each: torch.from_numpy(np.array(value)) for each, value in made.items()}
    spec = model.signature.spec(name)
    spec.check(tensors[name].shape, spec.dtype_name)
    return tensors


def _check_not_sent(made: Mapping[str, np.ndarray], name: str, given: Inputs) -> None:
    for view in given.tensors:
        if view.name in made:
            raise InvalidInputError(
                f"inputs: got {view.name!r} and audio for {name!r}, expected one of them: the "
                f"server makes {view.name!r} of the recordings"
            )


def _processor(model: LoadedModel) -> AudioProcessor:
    if model.audio is None:
        raise ValueError("parts_of refuses recordings for models that take none")
    return model.audio
