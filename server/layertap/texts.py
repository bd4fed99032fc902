"""Texts as the input of a model, and how they are tokenised. This doesn't import PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from layertap.errors import InvalidInputError

__all__ = ["TextOptions", "Texts", "Truncation"]


class Truncation(StrEnum):
    """Where a text with too many tokens is cut; ``layertap.v1.Truncation`` has the same names."""

    NONE = "none"
    """Nowhere: such a text is refused."""
    END = "end"
    """At its end: its first tokens stay."""
    START = "start"
    """At its start: its last tokens stay."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How the texts of a request are tokenised.

    Attributes:
        truncation: Where a text with more tokens than ``max_tokens`` is cut.
        max_tokens: The maximum number of tokens of a text, including special tokens; 0 for as
            many as the model takes.
        special_tokens: Whether the special tokens that the tokenizer puts around a text are added,
            such as ``[CLS]`` and ``[SEP]``.
        return_tokens: Whether the reply has the tokens too, as tensors named ``tokens.ids``,
            ``tokens.mask``, ``tokens.offsets`` and ``tokens.words``.
    """

    truncation: Truncation = Truncation.NONE
    max_tokens: int = 0
    special_tokens: bool = True
    return_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts for a model, one for each item; the model's own tokenizer converts them to ids.

    Attributes:
        texts: One text, or several.
        truncation: ``"none"``, ``"end"`` or ``"start"``: where a text with too many tokens is cut.
            With ``"none"`` it is refused.
        max_tokens: The maximum number of tokens of a text; 0 for as many as the model takes.
        special_tokens: Whether tokens such as ``[CLS]`` and ``[SEP]`` are added.
        return_tokens: Whether the reply has the tokens too: ``tokens.ids`` and ``tokens.mask``
            ``[B, L]``, ``tokens.offsets`` ``[B, L, 2]`` (begin and end in characters of the text)
            and ``tokens.words`` ``[B, L]`` (the number of the word, -1 for none), all int64.

    Raises:
        InvalidInputError: If the texts are not strings, or an option has an invalid value.
    """

    texts: str | Sequence[str]
    truncation: Truncation | str = Truncation.NONE
    max_tokens: int = 0
    special_tokens: bool = True
    return_tokens: bool = False

    def __post_init__(self) -> None:
        texts = [self.texts] if isinstance(self.texts, str) else list(self.texts)
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise InvalidInputError(f"texts: got a {type(wrong).__name__}, expected strings")
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InvalidInputError(
                    f"texts[{index}]: got a lone surrogate, expected Unicode that can be encoded"
                ) from None
        object.__setattr__(self, "texts", tuple(texts))
        try:
            object.__setattr__(self, "truncation", Truncation(self.truncation))
        except ValueError:
            raise InvalidInputError(
                f"truncation: got {self.truncation!r}, expected one of {', '.join(Truncation)}"
            ) from None
        if not isinstance(self.max_tokens, int) or not 0 <= self.max_tokens < 2**31:
            raise InvalidInputError(
                f"max_tokens: got {self.max_tokens!r}, expected a number from 1, or 0 for as many "
                f"as the model takes"
            )

    @property
    def options(self) -> TextOptions:
        """How they are tokenised."""
        return TextOptions(
            Truncation(self.truncation), self.max_tokens, self.special_tokens, self.return_tokens
        )
