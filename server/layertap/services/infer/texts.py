"""Reads texts, which are inputs of datatype BYTES, and how they are tokenised."""

from __future__ import annotations

from collections.abc import Sequence

from layertap.errors import InvalidInputError
from layertap.services.infer.parameters import Parameters, check_choice, flag, number
from layertap.texts import TextOptions, Truncation

__all__ = ["TEXT_PARAMETERS", "decoded_texts", "text_options"]

TEXT_PARAMETERS = ("truncation", "max_tokens", "omit_special_tokens", "return_tokens")
"""Parameters of an input of texts, or of a request for all of its texts.

They are the fields of ``layertap.v1.TextBatch`` with the same names.
"""

_INT32 = 2**31


def text_options(request: Parameters, tensor: Parameters, where: str) -> TextOptions:
    """Return how an input's texts are tokenised.

    Args:
        request: The parameters of the request, for all of its texts.
        tensor: The parameters of the input, which have priority.
        where: The input, for error messages.

    Raises:
        InvalidInputError: If a parameter has another type or an invalid value.
    """
    own = {name: request[name] for name in TEXT_PARAMETERS if name in request}
    own |= {name: tensor[name] for name in TEXT_PARAMETERS if name in tensor}
    most = number(own, "max_tokens", where)
    if not 0 <= most < _INT32:
        raise InvalidInputError(
            f"{where}: parameter 'max_tokens': got {most}, expected a number from 1, or 0 for as "
            f"many as the model takes"
        )
    return TextOptions(
        Truncation(check_choice(own, "truncation", tuple(Truncation), where)),
        most,
        special_tokens=not flag(own, "omit_special_tokens", where),
        return_tokens=flag(own, "return_tokens", where),
    )


def decoded_texts(elements: Sequence[bytes], where: str) -> tuple[str, ...]:
    """Return the texts in elements of datatype BYTES.

    Raises:
        InvalidInputError: If an element is not UTF-8.
    """
    return tuple(_decoded(data, index, where) for index, data in enumerate(elements))


def _decoded(data: bytes, index: int, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{where}: BYTES element {index}: got byte {data[error.start]:#04x} at offset "
            f"{error.start}, expected a text in UTF-8"
        ) from None
