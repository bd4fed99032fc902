"""The inputs of a model. They are checked before it runs, as a wrong shape fails late inside it.

Only this file, `Batch`, the model itself and the decoders know what is in a batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from layertap.errors import InvalidInputError
from layertap.models.batch import Batch, BatchKey, ItemTensor

__all__ = [
    "DEFAULT_NAME",
    "Boxes",
    "IdRange",
    "InputGuess",
    "InputSpec",
    "Mask",
    "Signature",
    "Tower",
]

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
        shapes: Item shapes that the model may take instead of the one in the `InputSpec`.
        uncertain: Whether the model may turn out not to take the input at all.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    free: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()
    uncertain: bool = False


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
class Mask:
    """A mask shows which elements of an item count and which are padding.

    Attributes:
        padding: The number for padding, 0 or 1; the other one means that an element counts.
        of: The input whose last dimensions the mask has; empty if the names of free dimensions say
            it. Some models take a mask of any size, and stretch it.
    """

    padding: int = 0
    of: str = ""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes on a page, as four whole numbers: left, top, right and bottom.

    Attributes:
        most: Every number is from 0 to ``most``; left is at most right, top at most bottom.
    """

    most: int


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One tensor that a model takes: ``[B, *shape]``, with the batch dimension first.

    Attributes:
        shape: The shape of the default item, without the batch, such as ``(3, 224, 224)``.
        free: The dimensions that may have another size, as indices into ``shape``, ascending:
            ``(1, 2)`` for images of any height and width. The others are fixed.
        dtype: The element type that the model computes with.
        also: Element types that are converted to it.
        guess: What of all that is to be found by running the module; None if the source knows
            the module well.
        values: What the elements stand for, which example batches must follow; None for any
            numbers, or for integers of which only 0 and 1 are known to be taken.
        name: What requests call it: the name of the argument of the module's ``forward``; with
            dots where the argument is a dict or a tuple of tensors, as in ``features.input_ids``
            and ``pair.0`` (see ``layertap.models.arguments``).
        optional: Whether a request may leave it out. The module is then called without it.
        symbols: The names of the free dimensions, one for each member of ``free``. Dimensions of
            one name have one size in all inputs of a request. Conventional names if empty.
        video: Whether an item is a video ``(T, C, H, W)``: T frames, each of which is an image.
    """

    shape: tuple[int, ...]
    free: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    also: tuple[torch.dtype, ...] = ()
    guess: InputGuess | None = None
    values: IdRange | Mask | Boxes | None = None
    name: str = DEFAULT_NAME
    optional: bool = False
    symbols: tuple[str, ...] = ()
    video: bool = False

    def __post_init__(self) -> None:
        allowed = range(len(self.shape))
        if list(self.free) != sorted(set(self.free)) or not set(self.free) <= set(allowed):
            raise ValueError(f"free: got {self.free} for an item of {self.shape}")
        if self.symbols and len(self.symbols) != len(self.free):
            raise ValueError(f"symbols: got {self.symbols} for free dimensions {self.free}")

    @property
    def dtype_name(self) -> str:
        """The dtype's name in the protocol, such as ``"float32"``."""
        return _name(self.dtype)

    @property
    def images(self) -> int:
        """The number of images in one item: T for a video, else 1."""
        return self.shape[0] if self.video else 1

    @property
    def image(self) -> InputSpec:
        """The input for one frame of a video alone; the input itself if it is no video."""
        if not self.video:
            return self
        free = tuple(axis - 1 for axis in self.free if axis)
        return replace(self, shape=self.shape[1:], free=free, symbols=(), video=False)

    @property
    def dimensions(self) -> list[tuple[int, str]]:
        """The default size of each dimension of an item, and the names of free dimensions."""
        named = dict(zip(self.free, self.free_names, strict=True))
        return [(size, named.get(index, "")) for index, size in enumerate(self.shape)]

    @property
    def free_names(self) -> tuple[str, ...]:
        """The names of the free dimensions, in the order of ``free``."""
        return self.symbols or _conventional(self)

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
class Tower:
    """A part of a model that can run by itself, such as the text encoder of CLIP.

    Attributes:
        inputs: The names of its inputs. No other tower of the model has them.
        method: The method of the module that runs it. It takes its inputs by name.
    """

    inputs: tuple[str, ...]
    method: str


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors that a model takes.

    Attributes:
        inputs: At least one, the first of which is not optional; no two of one name.
        towers: The parts of the model that run by themselves if a request has only their inputs.
            Those of their inputs that are not `InputSpec.optional` are required then.
    """

    inputs: tuple[InputSpec, ...]
    towers: tuple[Tower, ...] = ()

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.inputs]
        if not names or self.inputs[0].optional or len(set(names)) != len(names):
            raise ValueError(f"inputs: got {names}, expected distinct names, the first required")

    @property
    def main(self) -> InputSpec:
        """The first input; grids are found by changing its size."""
        return self.inputs[0]

    @property
    def required(self) -> tuple[InputSpec, ...]:
        """The inputs that a request for the whole model must have."""
        return tuple(spec for spec in self.inputs if not spec.optional)

    def tower_of(self, given: Iterable[str]) -> Tower | None:
        """Return the tower to which all given inputs belong; None if the whole model runs."""
        if not self.towers:
            return None
        names = set(given)
        return next((tower for tower in self.towers if names.issubset(tower.inputs)), None)

    def of_tower(self, tower: Tower) -> Signature:
        """Return the signature of requests for one tower."""
        inputs = [spec for spec in self.inputs if spec.name in tower.inputs]
        # Stable: required inputs first.
        return Signature(tuple(sorted(inputs, key=lambda spec: spec.optional)), (tower,))

    def may_leave_out(self, spec: InputSpec) -> bool:
        """Return whether a request may leave out an input, because it is optional or a tower's."""
        return spec.optional or any(spec.name not in tower.inputs for tower in self.towers)

    @property
    def key(self) -> BatchKey:
        """The key of a batch with the default item shapes, without optional inputs."""
        return _key(self.required)

    @property
    def whole_key(self) -> BatchKey:
        """The key of a batch with the default item shapes, with all optional inputs."""
        return _key(self.inputs)

    @property
    def has_floats(self) -> bool:
        """Whether any input is floating-point."""
        return any(spec.dtype.is_floating_point for spec in self.inputs)

    def spec(self, name: str) -> InputSpec:
        """Return the input with a name; raise KeyError if there is none."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise KeyError(name)

    def key_of(self, batch: Batch) -> BatchKey:
        """Return the key of a batch after its tensors are converted to the model's own dtypes."""
        return BatchKey(
            tuple(
                ItemTensor(spec.name, tuple(batch[spec.name].shape[1:]), spec.dtype)
                for spec in self._given(batch)
            )
        )

    def converted(self, batch: Batch) -> Batch:
        """Return a batch with its tensors converted to the model's own dtypes."""
        return Batch({spec.name: batch[spec.name].to(spec.dtype) for spec in self._given(batch)})

    def resized(self, shape: Sequence[int]) -> BatchKey:
        """Return the key of a batch in which items of the first input have another shape.

        Dimensions of other required inputs with the same names get the same sizes.
        """
        main = self.main
        sizes = {name: shape[axis] for axis, name in zip(main.free, main.symbols, strict=False)}
        key = self.key.with_shape(main.name, shape)
        for spec in self.required[1:]:
            named = dict(zip(spec.free, spec.symbols, strict=False))
            other = [sizes.get(named.get(axis, ""), size) for axis, size in enumerate(spec.shape)]
            key = key.with_shape(spec.name, other)
        return key

    def with_input(self, spec: InputSpec) -> Signature:
        """Return the signature with the input of the same name replaced."""
        inputs = tuple(spec if each.name == spec.name else each for each in self.inputs)
        return replace(self, inputs=inputs)

    def check(self, given: Mapping[str, tuple[Sequence[int], str]]) -> int:
        """Check the tensors of a batch.

        Args:
            given: The shape and dtype name of each tensor, by the input's name; the name may be
                empty if the model needs one input and one tensor is given.

        Returns:
            The size of the batch.

        Raises:
            InvalidInputError: A name, dtype, rank or fixed size is wrong, an input is missing, a
                size is zero, or two tensors differ in the size of the batch or of a free dimension
                that they have in common.
        """
        if list(given) == [""]:
            given = {self.only_required: given[""]}
        self._check_names(list(given))
        for spec in self.inputs:
            if spec.name in given:
                spec.check(*given[spec.name])
        shapes = {name: shape for name, (shape, _) in given.items()}
        self._check_common_sizes(shapes)
        sizes = {name: shape[0] for name, shape in shapes.items()}
        if len(set(sizes.values())) > 1:
            each = ", ".join(f"{size} of {name!r}" for name, size in sizes.items())
            raise InvalidInputError(f"inputs: got batches of {each}, expected one size for all")
        return next(iter(sizes.values()))

    @property
    def only_required(self) -> str:
        """The name of the input to which a tensor without a name belongs.

        Raises:
            InvalidInputError: The model needs several inputs.
        """
        if len(self.required) > 1:
            raise InvalidInputError(
                f"inputs: got a tensor without a name, expected a name for each: {self.pattern}"
            )
        return self.main.name

    @property
    def pattern(self) -> str:
        """The inputs in words, such as ``"input_ids [B, L], attention_mask [B, L] (optional)"``."""
        pattern = ", ".join(
            f"{spec.name} {spec.pattern}{' (optional)' if spec.optional else ''}"
            for spec in self.inputs
        )
        if not self.towers:
            return pattern
        towers = (
            " and ".join(spec.name for spec in self.of_tower(tower).required)
            for tower in self.towers
        )
        return f"{pattern}; or only {', or only '.join(towers)}"

    def _given(self, batch: Batch) -> list[InputSpec]:
        """Return the inputs for which a batch has a tensor."""
        return [spec for spec in self.inputs if spec.name in batch]

    def _check_names(self, given: Sequence[str]) -> None:
        known = [spec.name for spec in self.inputs]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise InvalidInputError(f"inputs: got {name!r}{hint}, expected {self.pattern}")
        tower = self.tower_of(given)
        required = self.required if tower is None else self.of_tower(tower).required
        missing = [spec.name for spec in required if spec.name not in given]
        if missing:
            raise InvalidInputError(
                f"inputs: got {', '.join(map(repr, given)) or 'none'} without "
                f"{', '.join(map(repr, missing))}, expected {self.pattern}"
            )

    def _check_common_sizes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse tensors in which free dimensions with the same name differ in size."""
        seen: dict[str, tuple[str, int]] = {}
        for spec in self.inputs:
            # Conventional names don't say that dimensions of two inputs must be equal.
            if spec.name not in shapes or not spec.symbols:
                continue
            for axis, symbol in zip(spec.free, spec.symbols, strict=True):
                size = shapes[spec.name][axis + 1]
                other, expected = seen.setdefault(symbol, (spec.name, size))
                if size != expected:
                    raise InvalidInputError(
                        f"input {spec.name!r}: got shape {list(shapes[spec.name])} with {symbol} "
                        f"{size}, expected {expected}, as {other!r} has"
                    )
        self._check_masks(shapes)

    def _check_masks(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a mask that is not of the size of what it masks."""
        for spec in self.inputs:
            if not isinstance(spec.values, Mask) or spec.name not in shapes:
                continue
            masked, own = shapes.get(spec.values.of), list(shapes[spec.name][1:])
            if masked is not None and own != list(masked[-len(own) :]):
                raise InvalidInputError(
                    f"input {spec.name!r}: got items of {own}, expected "
                    f"{list(masked[-len(own) :])}, as {spec.values.of!r} has"
                )


def _key(specs: Iterable[InputSpec]) -> BatchKey:
    return BatchKey(tuple(ItemTensor(spec.name, spec.shape, spec.dtype) for spec in specs))


def _conventional(spec: InputSpec) -> tuple[str, ...]:
    """Return what the free dimensions of an input are usually called."""
    count = len(spec.free)
    if spec.free == (0,) and len(spec.shape) == 1:
        # Token ids and masks, or the samples of a waveform.
        return ("samples",) if spec.dtype.is_floating_point else ("sequence",)
    if spec.free == (1,) and len(spec.shape) == 2 and spec.shape[0] <= 2:
        return ("samples",)  # The channels of a waveform are mono or stereo.
    return _NAMES.get(count) or tuple(f"N{number}" for number in range(1, count + 1))


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
