"""An input of a model, declared in the configuration: ``"int64 [sequence=16], mask, optional"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from layertap.errors import ConfigError
from layertap.settings.value_kinds import ValueKind

__all__ = ["INPUTS", "INPUT_DTYPES", "DeclaredInput"]

INPUT_DTYPES = (
    *("float32", "float64", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
"""The element types that an input may have."""

_FORM = re.compile(r"\s*(?P<dtype>\w+)\s*\[(?P<sizes>[^\]]*)\]\s*(?P<options>(?:,[^,]*)*)")
_SIZE = re.compile(r"(?:(?P<symbol>[A-Za-z]\w*)\s*=\s*)?(?P<size>[1-9][0-9]*)", re.ASCII)
_KIND = re.compile(r"mask|(?:ids|boxes)=[1-9][0-9]{0,17}", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
_EXPECTED = (
    'an element type, the sizes of an item in brackets and options, such as "int64 [sequence=16], '
    'mask, optional"'
)


@dataclass(frozen=True, slots=True)
class DeclaredInput:
    """One tensor that a model takes, without the batch.

    Attributes:
        name: The name of the argument of ``forward``, with dots for members of a dict or tuple.
        dtype: Its element type.
        shape: Sizes of the default item.
        symbols: The names of the dimensions that may have another size, by index. Dimensions with
            the same name must have the same size in all inputs of a request.
        optional: Whether a request may leave it out.
        mask: Whether it is a mask: 1 for elements that count, 0 for padding.
        ids: The number of valid token ids, counted from 0; 0 if it is not declared.
        boxes: The largest coordinate of boxes on a page, each of which is left, top, right and
            bottom in the last dimension; 0 if it has none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    symbols: tuple[tuple[int, str], ...] = ()
    optional: bool = False
    mask: bool = False
    ids: int = 0
    boxes: int = 0

    @classmethod
    def parse(cls, name: str, text: str) -> DeclaredInput:
        """Return the input that a text describes.

        Raises:
            ConfigError: The text or the name is malformed.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"inputs: got the name {name!r}, expected one such as input_ids or features.mask"
            )
        form = _FORM.fullmatch(text)
        if form is None or form["dtype"] not in INPUT_DTYPES:
            raise ConfigError(f"inputs.{name}: got {text!r}, expected {_EXPECTED}")
        sizes = [_SIZE.fullmatch(part.strip()) for part in form["sizes"].split(",") if part.strip()]
        found = [size for size in sizes if size is not None]
        if len(found) < len(sizes):
            raise ConfigError(
                f"inputs.{name}: got sizes [{form['sizes']}], expected numbers for fixed sizes and "
                f"NAME=NUMBER for others, such as [sequence=16, 4]"
            )
        options = [part.strip() for part in form["options"].split(",")[1:]]
        kinds = [option for option in options if _KIND.fullmatch(option)]
        unknown = [option for option in options if option not in ("optional", *kinds)]
        if unknown or len(kinds) > 1:
            raise ConfigError(
                f"inputs.{name}: got option {(unknown or kinds)[-1]!r}, expected optional, and at "
                f"most one of mask, ids such as ids=30522, and boxes such as boxes=1000"
            )
        kind, _, number = kinds[0].partition("=") if kinds else ("", "", "")
        shape = tuple(int(size["size"]) for size in found)
        if kind == "boxes" and shape[-1:] != (4,):
            raise ConfigError(f"inputs.{name}: got boxes of {shape}, expected 4 as the last size")
        return cls(
            name=name,
            dtype=form["dtype"],
            shape=shape,
            symbols=tuple(
                (index, size["symbol"]) for index, size in enumerate(found) if size["symbol"]
            ),
            optional="optional" in options,
            mask=kind == "mask",
            ids=int(number) if kind == "ids" else 0,
            boxes=int(number) if kind == "boxes" else 0,
        )

    def __str__(self) -> str:
        """Return the text that ``parse`` reads as this input."""
        symbols = dict(self.symbols)
        sizes = [
            f"{symbols[index]}={size}" if index in symbols else str(size)
            for index, size in enumerate(self.shape)
        ]
        options = [
            *(["mask"] if self.mask else []),
            *([f"ids={self.ids}"] if self.ids else []),
            *([f"boxes={self.boxes}"] if self.boxes else []),
            *(["optional"] if self.optional else []),
        ]
        return ", ".join([f"{self.dtype} [{', '.join(sizes)}]", *options])


def _parsed(texts: Mapping[str, str]) -> tuple[DeclaredInput, ...]:
    return tuple(DeclaredInput.parse(name, text) for name, text in texts.items())


def _texts(inputs: tuple[DeclaredInput, ...]) -> dict[str, str]:
    return {each.name: str(each) for each in inputs}


def _from_text(value: str) -> dict[str, str]:
    named = [part.partition("=") for part in value.split(";") if part.strip()]
    return {name.strip(): text for name, _, text in named}


INPUTS = ValueKind(
    dict[str, str],
    'a table of texts by name, such as {input_ids = "int64 [sequence=16]"}',
    "NAME=TYPE[SIZES];...",
    from_raw=_parsed,
    to_raw=_texts,
    from_text=_from_text,
    expected_text="inputs such as 'input_ids=int64[sequence=16];mask=int64[sequence=16],mask'",
)
