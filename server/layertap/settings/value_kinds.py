"""The kinds of values that settings have: what is valid, how it is written, how it is described.

A value is written as TOML in ``layertap.toml``, or as text on the command line. Both become the
same *raw* value (``[3, 224, 224]`` and ``3,224,224`` become ``(3, 224, 224)``), which is checked
once. Then it is converted to what the code works with: MiB to bytes, a text to a path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from layertap.selection import LayerSelection
from layertap.settings.paths import expanded

__all__ = [
    "DEVICE_PATTERN",
    "MIB",
    "ValueKind",
    "choice",
    "many",
    "mib",
    "path",
    "some_text",
    "whole",
]

MIB = 1 << 20
"""Bytes in one MiB."""

DEVICE_PATTERN = r"auto|cpu|cuda(:[0-9]{1,3})?"
"""Valid names of devices for models."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class ValueKind:
    """One kind of value.

    Attributes:
        raw: The type of a valid raw value, with its range, for msgspec to check.
        expected: What is expected, in the words of an error message: "a number from 1".
        metavar: The placeholder for the value in the help of the command line.
        from_raw: Converts a valid raw value to the one that the code works with.
        to_raw: The reverse.
        from_text: Converts the text of a flag to a raw value, which is checked afterwards. Raises
            ValueError if it can't.
        expected_text: What is expected on the command line, if it is written differently there.
        choices: The valid values, if there are only a few.
        is_path: Whether the value is a path, which is relative to the configuration file's folder.
        words: Values that are not paths although ``is_path`` is set, such as ``"off"``.
    """

    raw: Any
    expected: str
    metavar: str
    from_raw: Callable[[Any], Any] = _same
    to_raw: Callable[[Any], Any] = _same
    from_text: Callable[[str], Any] | None = None
    expected_text: str = ""
    choices: tuple[str, ...] = ()
    is_path: bool = False
    words: tuple[str, ...] = ()

    def check(self, raw: object) -> Any:
        """Return a raw value converted to its own type, for instance a list to a tuple.

        Raises:
            ValueError: If it is invalid; the message says what is expected.
        """
        try:
            return msgspec.convert(raw, self.raw)
        except msgspec.ValidationError:
            raise ValueError(f"got {raw!r}, expected {self.expected}") from None

    def parse(self, text: str) -> Any:
        """Return the raw value for a text on the command line.

        Raises:
            ValueError: If it is invalid; the message says what is expected.
        """
        try:
            if self.from_text is None:
                return msgspec.convert(text, self.raw, strict=False)
            return msgspec.convert(self.from_text(text), self.raw)
        except (ValueError, msgspec.ValidationError):
            expected = self.expected_text or self.expected
            raise ValueError(f"got {text!r}, expected {expected}") from None


def whole(least: int, most: int | None = None, expected: str = "") -> ValueKind:
    """Return the kind of whole numbers in a range."""
    to = "" if most is None else f" to {most}"
    return ValueKind(
        Annotated[int, Meta(ge=least, le=most)], expected or f"a number from {least}{to}", "N"
    )


def mib(least: int, most: int | None = None, expected: str = "") -> ValueKind:
    """Return the kind of sizes that are written in MiB and used in bytes."""
    to = "" if most is None else f" to {most}"
    return ValueKind(
        Annotated[int, Meta(ge=least, le=most)],
        expected or f"a number of MiB from {least}{to}",
        "MIB",
        from_raw=lambda number: number * MIB,
        to_raw=lambda size: size // MIB,
    )


def choice(*values: str) -> ValueKind:
    """Return the kind of texts that must be one of these."""
    quoted = [repr(value) for value in values]
    expected = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
    # mypy can't know the values of this Literal, and nothing here needs it to.
    raw: Any = Literal[values]
    return ValueKind(raw, expected, "|".join(values), choices=values)


def some_text(
    expected: str = "a text", metavar: str = "TEXT", pattern: str | None = None
) -> ValueKind:
    """Return the kind of texts that are not empty and, if given, match a pattern."""
    return ValueKind(Annotated[str, Meta(min_length=1, pattern=pattern)], expected, metavar)


def path(expected: str, metavar: str) -> ValueKind:
    """Return the kind of paths. The user's home may be written as ``~``."""
    return ValueKind(
        Annotated[str, Meta(min_length=1)],
        expected,
        metavar,
        from_raw=expanded,
        to_raw=str,
        is_path=True,
    )


def many(
    item: Any,
    expected: str,
    expected_text: str,
    metavar: str,
    parse: Callable[[str], Any],
    *,
    none: bool = False,
    one: bool = False,
    least: int = 0,
    most: int | None = None,
) -> ValueKind:
    """Return the kind of lists, which are written with commas on the command line.

    Args:
        item: The type of one item, for msgspec.
        expected: See ValueKind.
        expected_text: See ValueKind.
        metavar: See ValueKind.
        parse: Converts the text of one item; raises ValueError if it can't.
        none: Whether the word "none" on the command line means an empty list.
        one: Whether a single item may be written without a list.
        least: Minimum number of items.
        most: Maximum number of items; None for no limit.
    """

    def from_text(value: str) -> tuple[Any, ...]:
        if none and value == "none":
            return ()
        return tuple(parse(part) for part in value.split(","))

    # mypy takes `item` for a value.
    items: Any = Annotated[tuple[item, ...], Meta(min_length=least, max_length=most)]
    return ValueKind(
        items | item if one else items,
        expected,
        metavar,
        from_raw=(lambda raw: raw if isinstance(raw, tuple) else (raw,)) if one else _same,
        from_text=from_text,
        expected_text=expected_text,
    )


def _decimal(value: str) -> int:
    if not value.isdecimal():
        raise ValueError(value)
    return int(value)


_POSITIVE = Annotated[int, Meta(ge=1)]
_FROM_ZERO = Annotated[int, Meta(ge=0)]

TRUTH = ValueKind(bool, "true or false", "")
COUNT = whole(1)
PORT = whole(0, 65535, "a port from 0 to 65535; 0 is any free one")
DURATION = ValueKind(Annotated[float, Meta(ge=0)], "seconds from 0", "SECONDS")
DURATION_ABOVE_0 = ValueKind(Annotated[float, Meta(gt=0)], "a number of seconds above 0", "SECONDS")
MICROSECONDS = ValueKind(
    Annotated[int, Meta(ge=0)],
    "microseconds from 0",
    "N",
    from_raw=lambda number: number * 1e-6,
    to_raw=lambda seconds: round(seconds * 1e6),
)
FILE = path("a file", "FILE")
FILE_NAME = ValueKind(Annotated[str, Meta(min_length=1)], "a file", "FILE", is_path=True)
PEM = path("a file", "PEM")
PLAN_CACHE = ValueKind(
    Annotated[str, Meta(min_length=1)],
    "a folder, 'auto' or 'off'",
    "DIR|auto|off",
    is_path=True,
    words=("auto", "off"),
)
PERMISSIONS = ValueKind(
    Annotated[str, Meta(pattern="^0?[0-7]{3}$")],
    "permissions in octal digits, such as '0660'",
    "OCTAL",
    from_raw=lambda digits: int(digits, 8),
    to_raw=lambda mode: f"{mode:04o}",
    expected_text="octal digits such as 0660",
)
DEVICE = ValueKind(
    Annotated[str, Meta(pattern=rf"^({DEVICE_PATTERN})$")],
    "'auto', 'cpu', 'cuda' or 'cuda:1'",
    "DEVICE",
    expected_text="auto, cpu, cuda or cuda:1",
)
USERS = many(
    _FROM_ZERO,
    "a list of numbers of users, such as [1000]",
    "numbers such as 1000,1001",
    "N,N",
    _decimal,
)
SIZES = many(
    _POSITIVE,
    "sizes of one item without the batch, such as [3, 224, 224]",
    "positive sizes such as 3,224,224",
    "C,H,W",
    int,
    least=1,
)
IMAGE_SIZE = many(
    _POSITIVE,
    "a size, a list of height and width, or an empty list for none",
    "positive sizes such as 224 or 224,224, or none",
    "N|H,W",
    int,
    none=True,
    one=True,
)
CHANNELS = many(
    float,
    "a number, or a list with one for each channel, such as [0.5, 0.5, 0.5]",
    "numbers such as 0.485,0.456,0.406, or none",
    "X,X,X",
    float,
    none=True,
    one=True,
)
DIMENSIONS = many(
    _FROM_ZERO,
    "a list of indices into item_shape, such as [1, 2]",
    "indices such as 1,2, or none",
    "I,J",
    _decimal,
    none=True,
)
BATCH_SIZES = many(
    _POSITIVE,
    "a list of batch sizes, such as [1, 8]",
    "batch sizes such as 1,8",
    "N,N",
    _decimal,
)


def _layers(names: tuple[str, ...]) -> tuple[LayerSelection, ...]:
    return tuple(map(LayerSelection.parse, names))


def _names(layers: tuple[LayerSelection, ...]) -> tuple[str, ...]:
    return tuple(selection.text for selection in layers)


LAYERS = ValueKind(
    tuple[str, ...],
    'a list of layers such as ["layer1", "avgpool:input"]',
    "A,B:input",
    from_raw=_layers,
    to_raw=_names,
    from_text=lambda value: tuple(value.split(",")),
)
