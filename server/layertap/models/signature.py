"""The inputs of a model. They are checked before it runs, as a wrong shape fails late inside it.

Only this file, `Batch`, the model itself and the decoders know what is in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layertap.errors import InvalidInputError
from layertap.models.batch import Batch, BatchKey, ItemTensor

__all__ = ["DEFAULT_NAME", "IdRange", "InputGuess", "InputSpec", "Signature"]

DEFAULT_NAME = "input"
"""The name of an input if the module's ``forward`` doesn't give one."""

# Names by the number of free dimensions: T, H and W for a video, H and W for an image.
_NAMES = {1: ("L",), 2: ("H", "W"), 3: ("T", "H", "W")}


@dataclass(frozen=True, slots=True)
class InputGuess:
    """What a source does not know about its module's input, so that running it must show it.

    Attributes:
        dtypes: Dtypes that the model may take instead of the one in the `InputSpec`; none if the
            dtype was declared.
        free: Whether the free dimensions are a guess.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    free: bool = False


@dataclass(frozen=True, slots=True)
class IdRange:
    """The token ids that a model accepts.

    Attributes:
        rows: Ids run from 0 to ``rows - 1``.
        padding: The id for padding.
    """

    rows: int
    padding: int = 0


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One tensor that a model takes: ``[B, *shape]``, with the batch dimension first.

    Attributes:
        shape: The shape of the default item, without the batch, such as ``(3, 224, 224)``.
        free: The dimensions that may have another size, as indices into ``shape``, ascending:
            ``(1, 2)`` for images of any height and width. The others are fixed.
        dtype: The dtype that the model computes with.
        also: Other dtypes that are accepted and converted to it.
        guess: What is only guessed and must be found by running the model; None if nothing is.
        ids: The range of integers with which the model was found to run; None if the input is
            not integers, or if it is only known to run with 0 and 1.
        name: The name that requests use: that of the argument of the module's ``forward``.
    """

    shape: tuple[int, ...]
    free: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    also: tuple[torch.dtype, ...] = ()
    guess: InputGuess | None = None
    ids: IdRange | None = None
    name: str = DEFAULT_NAME

    def __post_init__(self) -> None:
        allowed = range(len(self.shape))
        if list(self.free) != sorted(set(self.free)) or not set(self.free) <= set(allowed):
            raise ValueError(f"free: got {self.free} for an item of {self.shape}")

    @property
    def dtype_name(self) -> str:
        """The dtype's name in the protocol, such as ``"float32"``."""
        return _name(self.dtype)

    @property
    def dimensions(self) -> list[tuple[int, str]]:
        """(default size, name) of each dimension of an item; the name is empty if it is fixed."""
        count = len(self.free)
        names = _NAMES.get(count) or tuple(f"N{number}" for number in range(1, count + 1))
        named = dict(zip(self.free, names, strict=True))
        return [(size, named.get(index, "")) for index, size in enumerate(self.shape)]

    @property
    def pattern(self) -> str:
        """The shape as text, such as ``"[B, 3, H, W]"``."""
        return f"[{', '.join(['B', *(name or str(size) for size, name in self.dimensions)])}]"

    def batch_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of a batch of default items."""
        return (batch, *self.shape)

    def check(self, shape: Sequence[int], dtype_name: str) -> None:
        """Check a batch's shape and dtype name.

        Raises:
            InvalidInputError: The dtype, the rank or a fixed size is wrong, or a size is zero. The
                message says what was expected.
        """
        if dtype_name not in map(_name, (self.dtype, *self.also)):
            others = "".join(f", or {_name(dtype)}" for dtype in self.also)
            raise InvalidInputError(
                f"input {self.name!r}: got dtype {dtype_name}, expected {self.dtype_name}, "
                f"the model's own{others}"
            )
        right = len(shape) == len(self.shape) + 1 and min(shape) >= 1
        if not right or not all(
            shape[index + 1] == size
            for index, size in enumerate(self.shape)
            if index not in self.free
        ):
            raise InvalidInputError(
                f"input {self.name!r}: got shape {list(shape)}, expected {self.pattern} (batch "
                f"first, no size zero), such as {list(self.batch_shape(1))}"
            )


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors that a model takes.

    Attributes:
        inputs: At least one input; names are unique.
    """

    inputs: tuple[InputSpec, ...]

    @property
    def main(self) -> InputSpec:
        """The first input: image files become this, and grids are found by changing its size."""
        return self.inputs[0]

    @property
    def key(self) -> BatchKey:
        """The key of a batch of items with the default shapes."""
        return BatchKey(tuple(ItemTensor(s.name, s.shape, s.dtype) for s in self.inputs))

    @property
    def has_floats(self) -> bool:
        """Whether any input is floating-point."""
        return any(spec.dtype.is_floating_point for spec in self.inputs)

    def key_of(self, batch: Batch) -> BatchKey:
        """Return the key of a batch after its tensors are converted to the model's own dtypes."""
        return BatchKey(
            tuple(
                ItemTensor(spec.name, tuple(batch[spec.name].shape[1:]), spec.dtype)
                for spec in self.inputs
            )
        )

    def converted(self, batch: Batch) -> Batch:
        """Return a batch with its tensors converted to the model's own dtypes."""
        return Batch({spec.name: batch[spec.name].to(spec.dtype) for spec in self.inputs})

    def with_main(self, spec: InputSpec) -> Signature:
        """Return the signature with another first input."""
        return Signature((spec, *self.inputs[1:]))

    def check(self, given: Mapping[str, tuple[Sequence[int], str]]) -> int:
        """Check the tensors of a batch.

        Args:
            given: The shape and dtype name of each tensor, by the input's name; the name may be
                empty if the model has one input and one tensor is given.

        Returns:
            The size of the batch.

        Raises:
            InvalidInputError: A name, dtype, rank or fixed size is wrong, a size is zero, or the
                tensors have different batch sizes. The message says what was expected.
        """
        if len(self.inputs) == 1 and list(given) == [""]:
            given = {self.main.name: given[""]}
        if given.keys() != {spec.name for spec in self.inputs}:
            raise InvalidInputError(
                f"inputs: got {', '.join(map(repr, given))}, expected "
                f"{', '.join(repr(spec.name) for spec in self.inputs)}"
            )
        for spec in self.inputs:
            spec.check(*given[spec.name])
        sizes = {name: shape[0] for name, (shape, _) in given.items()}
        if len(set(sizes.values())) > 1:
            each = ", ".join(f"{size} of {name!r}" for name, size in sizes.items())
            raise InvalidInputError(f"inputs: got batches of {each}, expected one size for all")
        return next(iter(sizes.values()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
