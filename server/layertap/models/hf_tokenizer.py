"""The tokenizer of a Hugging Face folder, as transformers reads it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from layertap.models.text import MASK, TYPES, TextTokenizer, bare

__all__ = ["longest_text_of", "tokenizer_of_folder"]

_log = logging.getLogger(__name__)

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_FULL_LENGTH = frozenset({"siglip_text_model", "siglip2_text_model"})
"""Text models that were trained with all texts padded to the full length; see Note [Padding]."""

_UNSET = 10**9
"""transformers uses a much larger number if a tokenizer doesn't limit the tokens."""


def tokenizer_of_folder(
    transformers: Any, folder: Path, model: Any, most: int, *, code: bool
) -> TextTokenizer | None:
    """Return the tokenizer of a folder; None if it has none that layertap can use.

    Args:
        transformers: The package.
        folder: The folder.
        model: The model of transformers.
        most: The maximum number of tokens according to other settings of the folder; 0 for none.
        code: Whether Python code of the folder may run.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        own = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=code, local_files_only=True
        )
    # A model without texts is better than no model; transformers raises many classes here.
    except Exception as error:  # noqa: BLE001
        _log.warning("tokenizer of %s is ignored, so it takes no texts: %s", folder, error)
        return None
    backend = getattr(own, "backend_tokenizer", None)
    if backend is None:
        _log.warning(
            "tokenizer of %s is ignored, so it takes no texts: %s runs in Python, expected one "
            "that the package tokenizers runs", folder, type(own).__name__,
        )  # fmt: skip
        return None
    limits = (most, own.model_max_length, longest_text_of(model))
    known = [limit for limit in limits if 0 < limit < _UNSET]
    made = bare(
        backend,
        min(known, default=0),
        _padding(own, model),
        "the folder's own tokenizer",
        types=TYPES in own.model_input_names,
    )
    if model.config.get_text_config().model_type not in _FULL_LENGTH:
        return made
    return replace(made, mask=MASK in own.model_input_names, length=made.max_tokens)


def longest_text_of(model: Any) -> int:
    """Return how many positions a model has for the tokens of a text; 0 if unknown."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return 0
    for part in model.modules():
        # RoBERTa and similar models number positions from after the padding id.
        if (
            isinstance(part, nn.Embedding)
            and part.num_embeddings == positions
            and part.padding_idx is not None
        ):
            return positions - part.padding_idx - 1
    return positions


def _padding(own: Any, model: Any) -> int:
    """Return the padding id; without one, any id works, because the mask excludes it."""
    config = model.config.get_text_config()
    for found in (own.pad_token_id, getattr(config, "pad_token_id", None), own.eos_token_id):
        if isinstance(found, int) and found >= 0:
            return found
    return 0
