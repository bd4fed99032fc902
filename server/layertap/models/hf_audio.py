"""The feature extractor of a Hugging Face folder, which converts recordings."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from layertap.models.arguments import parameters_of
from layertap.models.audio import AudioProcessor, can_decode
from layertap.models.signature import InputSpec
from layertap.models.text import MASK

__all__ = ["audio_inputs_of", "audio_of_folder"]

_log = logging.getLogger(__name__)

_FILES = ("preprocessor_config.json", "processor_config.json")
_INPUTS = ("input_values", "input_features")
_WAVEFORM, _SPECTROGRAM = "Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor"
"""The extractors whose padding and limits are known; others may cut recordings without a word."""


def audio_inputs_of(inputs: Iterable[InputSpec]) -> tuple[str, ...]:
    """Return the names of the inputs that may be recordings."""
    return tuple(each.name for each in inputs if each.name in _INPUTS)


def audio_of_folder(
    transformers: Any, folder: Path, model: Any, inputs: Iterable[InputSpec], *, code: bool
) -> AudioProcessor | None:
    """Return the feature extractor of a folder; None if it has none that layertap can use.

    Args:
        transformers: The package.
        folder: The folder.
        model: The model of transformers.
        inputs: The model's inputs.
        code: Whether Python code of the folder may run.
    """
    if not audio_inputs_of(inputs) or not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        own = transformers.AutoFeatureExtractor.from_pretrained(
            folder, trust_remote_code=code, local_files_only=True
        )
    # A model without recordings is better than no model; transformers raises many classes here.
    except Exception as error:  # noqa: BLE001
        _log.warning("feature extractor of %s is ignored, so it takes no audio: %s", folder, error)
        return None
    kind = type(own).__name__
    if kind not in (_WAVEFORM, _SPECTROGRAM):
        _log.warning(
            "feature extractor of %s is ignored, so it takes no audio: got %s, expected %s or %s",
            folder, kind, _WAVEFORM, _SPECTROGRAM,
        )  # fmt: skip
        return None
    if not can_decode():
        _log.warning(
            "model of %s takes no audio, as soundfile is not installed; install it with pip "
            "install 'layertap[audio]'", folder,
        )  # fmt: skip
        return None
    origin = f"the folder's own {kind}"
    rate = int(own.sampling_rate)
    if kind == _SPECTROGRAM:
        run = partial(_spectrograms, own)
        return AudioProcessor(run, rate, most=int(own.n_samples), origin=origin)
    masked = own.return_attention_mask and any(p.name == MASK for p in parameters_of(model))
    return AudioProcessor(
        partial(_waveforms, own, masked=masked), rate, one_length=not masked, origin=origin
    )


def _waveforms(own: Any, waveforms: list[np.ndarray], *, masked: bool) -> dict[str, np.ndarray]:
    made = own(
        waveforms,
        sampling_rate=own.sampling_rate,
        padding=True,
        return_attention_mask=masked,
        return_tensors="np",
    )
    return {name: np.asarray(value) for name, value in made.items()}


def _spectrograms(own: Any, waveforms: list[np.ndarray]) -> dict[str, np.ndarray]:
    # Padded to the full length, as the model was trained.
    made = own(waveforms, sampling_rate=own.sampling_rate, return_tensors="np")
    return {"input_features": np.asarray(made["input_features"])}
