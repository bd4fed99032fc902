"""Converts texts to a model's token ids, with the model's own tokenizer.

Note [Padding]
    The texts of a batch are padded on the right to the longest one, whatever the tokenizer's own
    configuration says. Models number positions from the first token on, so padding on the left
    would move a text's tokens to other positions and change their values. With padding on the right
    and a mask, a text's tokens have the same values as if it were sent alone, up to rounding.

    Some models were trained with all texts padded to one length and without a mask, and pool the
    last position: SigLIP. Their texts are always padded to that length.

Note [Truncation]
    A text with more tokens than the model takes is refused, unless the request says where to cut.
    Only the text is cut: the special tokens at its ends stay. A tokenizer's own settings for
    truncation and padding are not used, because they are shared by all threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from layertap.errors import InvalidInputError, ModelLoadError
from layertap.texts import TextOptions, Truncation

__all__ = [
    "DEFAULT_OPTIONS",
    "IDS",
    "MASK",
    "TYPES",
    "TextTokenizer",
    "TokenizedTexts",
    "bare",
    "tokenizer_file",
    "tokenizer_of_file",
]

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"

TOKENIZER_FILE = "tokenizer.json"


DEFAULT_OPTIONS = TextOptions()


class TokenizedTexts(NamedTuple):
    """A batch of texts as tokens, padded on the right to the longest one; L is its length.

    Attributes:
        ids: int64 ``[B, L]``; positions without a token have the padding id.
        mask: int64 ``[B, L]``: 1 for a token, 0 for padding.
        types: int64 ``[B, L]``: 0 for the first text of a pair and for padding.
        offsets: int64 ``[B, L, 2]``: begin and end of a token in the text, in characters (Unicode
            code points); 0 and 0 for special tokens and padding.
        words: int64 ``[B, L]``: the number of the word, counted by the tokenizer, to which a token
            belongs; -1 for special tokens and padding.
    """

    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    words: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text, int64 ``[B]``."""
        lengths: np.ndarray = self.mask.sum(1)
        return lengths


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A model's tokenizer. Safe to share between threads.

    Attributes:
        backend: The ``tokenizers.Tokenizer``, without truncation and padding of its own.
        max_tokens: The maximum number of tokens that the model takes; 0 if unknown.
        padding: The padding id.
        types: Whether to give the model token types, if it takes them.
        mask: Whether to give the model a mask, if it takes one.
        length: The number of tokens to which every text is padded; 0 for the longest of a request.
        origin: Where it comes from, such as ``"the folder's tokenizer"``; shown to clients.
    """

    backend: Any
    max_tokens: int = 0
    padding: int = 0
    types: bool = True
    origin: str = ""
    mask: bool = True
    length: int = 0

    def tokenize(
        self,
        texts: Sequence[str],
        options: TextOptions = DEFAULT_OPTIONS,
        check: Callable[[], object] = lambda: None,
    ) -> TokenizedTexts:
        """Tokenise the texts of a request. It doesn't use PyTorch, so any thread may call it.

        Args:
            texts: At least one.
            options: How to tokenise.
            check: Called between texts; may raise if the request's deadline has passed.

        Raises:
            InvalidInputError: There is no text, one is empty, has no tokens or too many, or the
                options ask for more tokens than the model takes.
        """
        if not texts:
            raise InvalidInputError("texts: got none, expected at least one")
        most = self._most(options)
        encoded = []
        for index, text in enumerate(texts):
            check()
            encoded.append(self._encode(text, index, most, options))
        return _padded(encoded, self.padding, self.length)

    def describe(self) -> str:
        """Describe in words how a text is tokenised."""
        most = f", at most {self.max_tokens} tokens" if self.max_tokens else ""
        to = f" to {self.length} tokens, without a mask" if self.length and not self.mask else ""
        return (
            f"{self.origin or 'its own tokenizer'}{most}, padded on the right with {self.padding}"
            f"{to}"
        )

    def _most(self, options: TextOptions) -> int:
        """Return the maximum number of tokens of a text; 0 for no limit."""
        asked, own = options.max_tokens, self.max_tokens
        if asked < 0 or (own and asked > own):
            raise InvalidInputError(
                f"texts: got max_tokens {asked}, expected 1 to {own or 'any number'}, or 0 for as "
                f"many as the model takes"
            )
        most = asked or own
        if options.truncation is not Truncation.NONE and not most:
            raise InvalidInputError(
                f"texts: got truncation {options.truncation!s} without max_tokens, expected a "
                f"number, as nothing says how many tokens this model takes"
            )
        return most

    def _encode(self, text: str, index: int, most: int, options: TextOptions) -> _Tokens:
        if not text:
            raise _wrong(index, "got an empty text, expected at least one character")
        # A list of one, because only encode_batch releases the GIL.
        (encoding,) = self.backend.encode_batch([text], add_special_tokens=options.special_tokens)
        if not len(encoding):
            raise _wrong(
                index, "got a text of which the tokenizer makes no token, expected at least one"
            )
        tokens = _Tokens(encoding.ids, encoding.type_ids, encoding.offsets, encoding.word_ids)
        if not most or len(encoding) <= most:
            return tokens
        if options.truncation is Truncation.NONE:
            raise _wrong(
                index,
                f"got {len(encoding)} tokens, expected at most {most}; send a shorter text, or ask "
                f"for it to be cut by truncation 'end' or 'start'",
            )
        return _cut(tokens, encoding.special_tokens_mask, most, index, options.truncation)


class _Tokens(NamedTuple):
    """The tokens of one text: the columns of `TokenizedTexts`."""

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    words: list[int | None]

    def at(self, kept: slice) -> _Tokens:
        """Return the tokens at some places."""
        return _Tokens(self.ids[kept], self.types[kept], self.offsets[kept], self.words[kept])

    def then(self, other: _Tokens) -> _Tokens:
        """Return these tokens, followed by others."""
        return _Tokens(
            self.ids + other.ids,
            self.types + other.types,
            self.offsets + other.offsets,
            self.words + other.words,
        )


def _cut(
    tokens: _Tokens, special: Sequence[int], most: int, index: int, side: Truncation
) -> _Tokens:
    """Return ``most`` tokens of a text, including the special tokens at its ends."""
    whole = len(special)
    begin = next((place for place in range(whole) if not special[place]), whole)
    end = next((place for place in range(whole, begin, -1) if not special[place - 1]), begin)
    room = most - begin - (whole - end)
    if room < 1:
        raise _wrong(
            index,
            f"got max_tokens {most}, expected more than the {most - room} special tokens",
        )
    kept = slice(begin, begin + room) if side is Truncation.END else slice(end - room, end)
    return tokens.at(slice(0, begin)).then(tokens.at(kept)).then(tokens.at(slice(end, whole)))


def _wrong(index: int, message: str) -> InvalidInputError:
    return InvalidInputError(f"texts[{index}]: {message}")


def _padded(texts: Sequence[_Tokens], padding: int, least: int = 0) -> TokenizedTexts:
    batch, longest = len(texts), max(least, *(len(text.ids) for text in texts))
    ids = np.full((batch, longest), padding, np.int64)
    mask = np.zeros((batch, longest), np.int64)
    types = np.zeros((batch, longest), np.int64)
    offsets = np.zeros((batch, longest, 2), np.int64)
    words = np.full((batch, longest), -1, np.int64)
    for row, text in enumerate(texts):
        length = len(text.ids)
        ids[row, :length] = text.ids
        mask[row, :length] = 1
        types[row, :length] = text.types
        offsets[row, :length] = text.offsets
        words[row, :length] = [-1 if word is None else word for word in text.words]
    return TokenizedTexts(ids, mask, types, offsets, words)


def tokenizer_file(path: Path) -> Path:
    """Return the tokenizer file at a path: the path itself, or the file in that folder."""
    return path / TOKENIZER_FILE if path.is_dir() else path


def tokenizer_of_file(path: Path, max_tokens: int = 0) -> TextTokenizer:
    """Read a ``tokenizer.json``, or the one in a folder.

    If ``max_tokens`` is 0, the file's own truncation limits the tokens. Its padding gives the
    padding id.

    Raises:
        ModelLoadError: The package ``tokenizers`` is not installed, or the file can't be read.
    """
    file = tokenizer_file(path)
    try:
        # Optional: only models that take texts need it.
        from tokenizers import Tokenizer  # noqa: PLC0415
    except ImportError as error:
        raise ModelLoadError(
            "tokenizers is not installed; install it with pip install 'layertap[hf]'"
        ) from error
    try:
        backend = Tokenizer.from_file(str(file))
    # The package raises plain Exception for any file that it can't read.
    except Exception as error:
        raise ModelLoadError(f"tokenizer {file}: {error}; expected a {TOKENIZER_FILE}") from error
    own = json.loads(file.read_text("utf-8"))
    limit = max_tokens or int((own.get("truncation") or {}).get("max_length") or 0)
    padding = int((own.get("padding") or {}).get("pad_id") or _padding_of(backend))
    # A file doesn't say whether the model gets token types, and zeros may differ from none.
    return bare(backend, limit, padding, TOKENIZER_FILE, types=False)


def bare(
    backend: Any, max_tokens: int, padding: int, origin: str, *, types: bool = True
) -> TextTokenizer:
    """Return the tokenizer for a backend, without the backend's own truncation and padding."""
    backend.no_truncation()
    backend.no_padding()
    return TextTokenizer(backend, max_tokens, padding, types, origin)


def _padding_of(backend: Any) -> int:
    """Return the id of a padding token that is common among tokenizers, or else 0."""
    for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"):
        found = backend.token_to_id(token)
        if found is not None:
            return int(found)
    return 0
