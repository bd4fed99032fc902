"""The kinds of values that settings have: what is valid, how it is written, how it is described.

A value is written in one of two ways, as TOML in ``layertap.toml`` and as text on the command line.
Both become the same *raw* value (``[3, 224, 224]`` and ``3,224,224`` become ``(3, 224, 224)``),
which is checked once and then turned into what the code works with: MiB into bytes, a text into a
path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from layertap.selection import Capture, LayerSelection
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
"""Bytes of one MiB."""

DEVICE_PATTERN = r"auto|cpu|cuda(:[0-9]{1,3})?"
"""The devices that models run on."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class ValueKind:
    """One kind of value.

    Attributes:
        raw: The type of a valid raw value, with its range, for msgspec to check.
        expected: What is expected, in the words of an error message: "a number from 1".
        metavar: What stands for the value in the help of the command line.
        from_raw: Turns a valid raw value into the one that the code works with.
        to_raw: The reverse.
        from_text: Turns the text of a flag into a raw value, which is checked afterwards. Raises
            ValueError for a text that is no such thing.
        expected_text: What is expected on the command line, where that is written differently.
        choices: The valid values, where there are only a few.
        is_path: Whether the value names a file or folder, which a configuration file names relative
            to itself.
        words: Values that are not paths although the others are, such as ``"off"``.
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
        """Return a raw value as its own type, a list as a tuple for instance.

        Raises:
            ValueError: For one that is not valid; the message says what is expected.
        """
        try:
            return msgspec.convert(raw, self.raw)
        except msgspec.ValidationError:
            raise ValueError(f"got {raw!r}, expected {self.expected}") from None

    def parse(self, text: str) -> Any:
        """Return the raw value that a text on the command line stands for.

        Raises:
            ValueError: For one that is not valid; the message says what is expected.
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
    """Return the kind of texts of which there are only these."""
    quoted = [repr(value) for value in values]
    expected = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
    # mypy can't know the values of this Literal, and nothing here needs it to.
    raw: Any = Literal[values]
    return ValueKind(raw, expected, "|".join(values), choices=values)


def some_text(
    expected: str = "a text", metavar: str = "TEXT", pattern: str | None = None
) -> ValueKind:
    """Return the kind of texts that are not empty, and of one form where a pattern is given."""
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
    least: int = 0,
    most: int | None = None,
) -> ValueKind:
    """Return the kind of lists: with commas on the command line.

    Args:
        item: The type of one item, for msgspec.
        expected: As for ValueKind.
        expected_text: As for ValueKind.
        metavar: As for ValueKind.
        parse: Turns the text of one item into it; raises ValueError.
        none: Whether the word "none" on the command line stands for an empty list.
        least: How many items there must be.
        most: How many there may be; None for any number.
    """

    def from_text(value: str) -> tuple[Any, ...]:
        if none and value == "none":
            return ()
        return tuple(parse(part) for part in value.split(","))

    return ValueKind(
        Annotated[tuple[item, ...], Meta(min_length=least, max_length=most)],
        expected,
        metavar,
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
    "a list of one size or of height and width, or an empty one for none",
    "positive sizes such as 224 or 224,224, or none",
    "N|H,W",
    int,
    none=True,
)
CHANNELS = many(
    float,
    "a list with a number for each channel, such as [0.5, 0.5, 0.5]",
    "numbers such as 0.485,0.456,0.406, or none",
    "X,X,X",
    float,
    none=True,
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
    return tuple(map(_name, layers))


def _name(selection: LayerSelection) -> str:
    """Return what LayerSelection.parse reads as this selection."""
    layer = re.sub(r"([:=\\])", r"\\\1", selection.layer)
    side = ":input" if selection.capture is Capture.INPUT else ""
    return f"{layer}{side}{'=' if selection.alias else ''}{selection.alias}"


LAYERS = ValueKind(
    tuple[str, ...],
    'a list of layers such as ["layer1", "avgpool:input"]',
    "A,B:input",
    from_raw=_layers,
    to_raw=_names,
    from_text=lambda value: tuple(value.split(",")),
)
