"""Converts a request's texts to the tensors of a batch: token ids, the mask and token types."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from layertap.call import Call
from layertap.engine.batch import Inputs, TextBatch
from layertap.engine.reply_layout import Beside
from layertap.errors import InvalidInputError
from layertap.extraction.masked import Tokens
from layertap.models import Batch, InputSpec, LoadedModel, Mask
from layertap.models.text import IDS, TYPES, TextTokenizer, TokenizedTexts
from layertap.settings import Limits

__all__ = [
    "TextBatch",
    "beside_batch",
    "check_texts",
    "names_of_texts",
    "tensors_of_texts",
    "tokenize",
]


def check_texts(given: Mapping[str, TextBatch], limits: Limits) -> None:
    """Check the texts of a request, by the input that they are for.

    Raises:
        InvalidInputError: There are too many bytes, or tokens are requested for two inputs.
    """
    size = sum(len(text.encode()) for each in given.values() for text in each.texts)
    if size > limits.text_bytes:
        raise InvalidInputError(
            f"texts: got {size} bytes in all, expected at most {limits.text_bytes}; send fewer or "
            f"shorter texts at once"
        )
    if sum(each.options.return_tokens for each in given.values()) > 1:
        raise InvalidInputError("texts: got return_tokens for two inputs, expected it for one")


def tokenize(model: LoadedModel, given: TextBatch, limits: Limits, call: Call) -> TokenizedTexts:
    """Tokenise a batch of texts. It doesn't use PyTorch, so any thread may call it.

    Raises:
        InvalidInputError: As ``TextTokenizer.tokenize``.
        DeadlineExceededError, CancelledError: If the caller no longer waits.
    """
    return _tokenizer(model).tokenize(given.texts, given.options, call.check)


def tensors_of_texts(
    model: LoadedModel, given: Inputs, tokenized: Mapping[str, TokenizedTexts]
) -> dict[str, torch.Tensor]:
    """Return the tensors made from texts: ids, and mask and token types if the model gets them.

    Raises:
        InvalidInputError: The texts have different numbers of tokens and the model takes no mask,
            or the request has a tensor that would be made from the texts.
    """
    sent = {view.name for view in given.tensors}
    made: dict[str, torch.Tensor] = {}
    for name, tokens in tokenized.items():
        spec = model.signature.spec(name)
        mask, types = _mask_of(model, spec), _types_of(model, spec)
        for other in (mask, types):
            if other is not None and other.name in sent:
                raise InvalidInputError(
                    f"inputs: got {other.name!r} and texts for {name!r}, expected one of them: the "
                    f"server makes {other.name!r} of the texts"
                )
        made[name] = torch.from_numpy(tokens.ids)
        if mask is not None and _tokenizer(model).mask:
            made[mask.name] = _as_mask(tokens.mask, mask)
        elif not tokens.mask.all() and not _tokenizer(model).length:
            raise InvalidInputError(
                f"texts: got texts of {_different(tokens)} tokens, expected one number of tokens, "
                f"as model {model.name!r} takes no mask; send them one at a time"
            )
        if types is not None:
            made[types.name] = torch.from_numpy(tokens.types)
    return made


def names_of_texts(model: LoadedModel) -> tuple[str, ...]:
    """Return the inputs that a request of texts alone gives, in the order of the signature.

    All inputs if the model takes no texts.
    """
    specs = model.signature.inputs
    if not model.text_inputs:
        return tuple(spec.name for spec in specs)
    ids = model.signature.spec(model.text_inputs[0])
    given = [ids, _types_of(model, ids), _mask_of(model, ids) if _tokenizer(model).mask else None]
    if model.signature.tower_of([ids.name]) is None:
        given.extend(model.signature.required)
    return tuple(spec.name for spec in specs if spec in given)


def beside_batch(
    model: LoadedModel,
    x: Batch,
    texts: Mapping[str, TextBatch],
    tokenized: Mapping[str, TokenizedTexts],
) -> Beside:
    """Return which positions of a batch count, and the tokens to include in the reply."""
    main = model.signature.main
    spec = _mask_of(model, main)
    tokens = None
    if spec is not None and spec.name in x:
        of_texts = tokenized.get(main.name)
        words = None if of_texts is None else torch.from_numpy(of_texts.words)
        tokens = Tokens(_counts(x[spec.name], spec), words)
    elif main.name in tokenized:
        own = tokenized[main.name]
        tokens = Tokens(torch.from_numpy(own.mask).bool(), torch.from_numpy(own.words))
    asked = [name for name, batch in texts.items() if batch.options.return_tokens]
    return Beside(tokens, _arrays(tokenized[asked[0]]) if asked else ())


def _arrays(tokens: TokenizedTexts) -> list[tuple[str, np.ndarray]]:
    return [
        ("tokens.ids", tokens.ids),
        ("tokens.mask", tokens.mask),
        ("tokens.offsets", tokens.offsets),
        ("tokens.words", tokens.words),
    ]


def _tokenizer(model: LoadedModel) -> TextTokenizer:
    if model.tokenizer is None:
        raise ValueError("parts_of refuses models without a tokenizer")
    return model.tokenizer


def _mask_of(model: LoadedModel, ids: InputSpec) -> InputSpec | None:
    """Return the mask for an input: of its size, and by its name if there are two."""
    fitting = [
        spec
        for spec in model.signature.inputs
        if isinstance(spec.values, Mask)
        and spec.shape == ids.shape[:1]
        and spec.free_names == ids.free_names
    ]
    named = [spec for spec in fitting if spec.name == ids.name.replace(IDS, "attention_mask")]
    return next(iter(named or fitting), None)


def _types_of(model: LoadedModel, ids: InputSpec) -> InputSpec | None:
    tokenizer = model.tokenizer
    if ids is not model.signature.main or tokenizer is None or not tokenizer.types:
        return None
    return next((spec for spec in model.signature.inputs if spec.name == TYPES), None)


def _as_mask(counts: np.ndarray, spec: InputSpec) -> torch.Tensor:
    mask = torch.from_numpy(counts)
    return mask if isinstance(spec.values, Mask) and spec.values.padding == 0 else 1 - mask


def _counts(mask: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    padding = spec.values.padding if isinstance(spec.values, Mask) else 0
    return mask != padding


def _different(tokens: TokenizedTexts) -> str:
    lengths = sorted({int(length) for length in tokens.lengths})
    return f"{lengths[0]} to {lengths[-1]}"
