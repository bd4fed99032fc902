"""Guards: find which branches a model's code takes for an input, without running the model.

Note [Outcomes]
    Code such as ``if mask.all():`` looks at a value of the input and then takes one branch or
    another. A program that was recorded from one pass contains only the branches that its example
    took. It is right for every input whose looks give the same values as the example's. The values
    that the looks of a pass give, in order, are the outcome of that pass: ``("True",)`` for a mask
    of ones. Each compiled plan is made and proven for one outcome, and a guard finds the outcome of
    a request before a plan is chosen.

Note [How a guard is made]
    The model itself runs once under a `Tape`, which records each operation with its arguments. At a
    look, the operations that lead from the inputs to the number are copied from the tape. They are
    the guard's program for that look: the model's own operations, so the number has the same bits.
    The program is valid for batches of the same shapes whose earlier looks had the same outcome,
    because the model's Python code does the same for them. So guards form a tree for each shape of
    batch: a look, and for each value that it gave, the looks that follow. If a batch leaves the
    tree, its outcome is not known yet.

Note [What is refused]
    A guard runs before each pass, so it must be much faster than the pass. Programs with matrix
    products, convolutions or attention are refused, and so are programs that touch more than
    `FREE_ELEMENTS` and more than a `SHARE` of the pass's elements. What can't be repeated is
    refused too: random numbers, values that NumPy reads, and operations inside ``torch.vmap``.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef

from layertap.extraction.leaves import leaves
from layertap.listing import listed
from layertap.models import Batch
from layertap.models.tensor_content import is_wrapper

__all__ = [
    "GuardTree",
    "Look",
    "Outcome",
    "Tape",
    "in_words",
    "is_fraction",
    "is_subsequence",
    "why_not",
]

_log = logging.getLogger(__name__)

Outcome = tuple[str, ...]
"""The ``repr`` of the values that the looks of one pass gave, in order; empty for no looks."""

FREE_ELEMENTS = 1 << 20
"""Elements that a guard may touch, whatever the pass does: about a millisecond of work."""

SHARE = 0.1
"""A larger guard is accepted up to this share of the elements that the pass touches."""

MAX_STEPS = 256
"""Maximum number of operations in the program of one look."""

MAX_LOOKS = 64
"""Maximum number of looks in one pass; code with more looks probably loops over values."""

MAX_LEAVES = 32
"""Maximum number of outcomes in one tree."""

CONSTANT_ELEMENTS = 1 << 16
"""Maximum size of a constant that is copied into a guard; parameters are not copied."""

FEW_ELEMENTS = 1 << 14
"""Number of elements below which PyTorch runs an operation on the calling thread alone."""

_HEAVY = (
    "mm", "bmm", "matmul", "linear", "bilinear", "einsum", "tensordot", "attention", "conv",
    "lstm", "gru", "rnn", "cdist", "fft", "linalg", "svd", "transformer", "addmv", "mv", "dot",
)  # fmt: skip
"""Parts of the names of operations that a guard must not contain."""


class _Ref(NamedTuple):
    """One tensor of a recorded pass: a view of a storage.

    Attributes:
        storage: The number of its storage.
        shape: Its sizes.
        stride: Its strides.
        offset: Its first element in the storage.
        dtype: Its element type.
    """

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Step:
    """One recorded operation.

    Attributes:
        func: The operation.
        args: Its positional arguments, tensors as `_Ref`.
        kwargs: Its other arguments.
        results: Its results, in the order of the leaves; None for a result that is not a tensor.
        elements: The elements of its arguments and results.
        fault: Why a guard must not contain it; empty if it may.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[_Ref | None, ...]
    elements: int
    fault: str = ""

    @property
    def name(self) -> str:
        return str(getattr(self.func, "__name__", self.func))


@dataclass(frozen=True)
class _Program:
    """The operations from a batch to one look.

    Attributes:
        inputs: The batch's tensors by their names.
        constants: Tensors that are not computed from the batch.
        steps: The operations, in order; the last one gives the number.
        writes: Whether some operation writes to the batch.
    """

    inputs: Mapping[str, _Ref]
    constants: Mapping[_Ref, torch.Tensor]
    steps: tuple[_Step, ...]
    writes: bool

    @property
    def elements(self) -> int:
        return sum(step.elements for step in self.steps)

    def run(self, x: Batch) -> str:
        """Return the value that the look gives for a batch of the recorded shapes."""
        values: dict[_Ref, torch.Tensor] = dict(self.constants)
        bases: dict[int, torch.Tensor] = {}
        for name, given_ref in self.inputs.items():
            tensor = x[name]
            plain = tensor.is_contiguous() and not tensor.storage_offset()
            given = tensor if plain and not self.writes else tensor.clone().contiguous()
            values[given_ref] = bases[given_ref.storage] = given

        def resolved(value: Any) -> Any:
            if isinstance(value, _Ref):
                known = values.get(value)
                if known is not None:
                    return known
                # A view that was made without an operation.
                base = bases[value.storage]
                if base.dtype != value.dtype:
                    raise KeyError(value)
                return base.as_strided(value.shape, value.stride, value.offset)
            if isinstance(value, list):
                return [resolved(each) for each in value]
            if isinstance(value, tuple):
                return tuple(resolved(each) for each in value)
            return value

        result: Any = None
        for step in self.steps:
            kwargs = {name: resolved(value) for name, value in step.kwargs.items()}
            result = step.func(*resolved(step.args), **kwargs)
            made = leaves(result) if step.results else []
            for ref, leaf in zip(step.results, made, strict=True):
                if ref is not None:
                    values[ref] = leaf
                    bases.setdefault(ref.storage, leaf)
        return repr(result)


@dataclass(frozen=True)
class Look:
    """One look of a pass at a value that depends on its input.

    Attributes:
        outcome: The value that it gave.
        program: Computes the value for another batch.
        fault: Why there can't be a guard for it, whatever the rest of the pass does; empty if there
            can.
    """

    outcome: str
    program: _Program
    fault: str = ""

    @property
    def path(self) -> tuple[str, ...]:
        """The names of the operations that lead to it, except those that only make views."""
        return tuple(step.name for step in self.program.steps if not _only_views(step.func))


def _only_views(func: Any) -> bool:
    return bool(getattr(func, "is_view", False))


def _shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


class Tape:
    """Records the operations of one forward pass, and its looks.

    Args:
        module: The model; its parameters and buffers are held by reference.
        given: The pass's input, by name; contiguous, so that other batches can replace it.

    Attributes:
        looks: The looks so far, in order.
        elements: The elements that all operations touched.
        closed: Whether later operations are ignored.
    """

    def __init__(self, module: nn.Module, given: Mapping[str, torch.Tensor]) -> None:
        self.looks: list[Look] = []
        self.elements = 0
        self.closed = False
        self._numbers: dict[StorageWeakRef, int] = {}
        self._next = 0
        self._limit = 256
        self._steps: list[_Step] = []
        # For each storage, the steps from which its content is computed, as bits.
        self._from: dict[int, int] = {}
        self._made: set[_Ref] = set()
        self._fixed: set[int] = set()
        self._constants: dict[_Ref, torch.Tensor] = {}
        self._faults: dict[_Ref, str] = {}
        self._seen: set[tuple[str, int]] = set()
        self._own = {
            StorageWeakRef(tensor.untyped_storage())
            for tensors in (module.parameters(), module.buffers())
            for tensor in tensors
            if _has_sizes(tensor)
        }
        self._inputs = {name: self._ref(tensor) for name, tensor in given.items()}
        for ref in self._inputs.values():
            self._from[ref.storage] = 0

    def before(self, func: Any, args: Any, kwargs: Any) -> _Call | None:
        """Record an operation that is about to run; pass the result to ``after``."""
        if self.closed:
            return None
        call = _Call(func, args, kwargs)
        tensors = list(_tensors((args, kwargs)))
        for tensor in tensors:
            self._know(tensor)
        call.args, call.kwargs = self._refs(args), self._refs(kwargs)
        call.read = [self._ref(tensor) for tensor in tensors]
        call.elements = sum(tensor.numel() for tensor in tensors)
        call.fault = _fault(func, (args, kwargs))
        call.written = [self._ref(tensor) for tensor in _written(func, args, kwargs)]
        return call

    def after(self, call: _Call | None, result: Any, *, looks: bool) -> None:
        """Record what the operation returned.

        Args:
            call: What ``before`` returned.
            result: What the operation returned.
            looks: Whether it took a number from a value that depends on the input.
        """
        if call is None:
            return
        made = leaves(result)
        refs = tuple(self._ref(leaf) if _is_strided(leaf) else None for leaf in made)
        elements = call.elements + sum(leaf.numel() for leaf in made if _is_strided(leaf))
        self.elements += elements
        fault = call.fault or next((self._faults[r] for r in call.read if r in self._faults), "")
        if any(ref.storage in self._fixed for ref in call.written):
            fault = fault or "it writes to a tensor that is not computed from the input"
        before = 0
        for ref in call.read:
            before |= self._from.get(ref.storage, 0)
        step = _Step(call.func, call.args, call.kwargs, refs, elements, fault)
        self._steps.append(step)
        mine = before | 1 << (len(self._steps) - 1)
        for ref in (*filter(None, refs), *call.written):
            self._from[ref.storage] = self._from.get(ref.storage, 0) | mine
        self._made.update(filter(None, refs))
        if looks:
            self._look(mine, result, "" if _is_number(result) else "it gives no plain number")
        self._forget_freed()

    def export(self, func: Any, args: Any, result: Any) -> None:
        """Record that a function took values from tensors without an operation."""
        if self.closed:
            return
        tensors = list(_tensors(args))
        for tensor in tensors:
            self._know(tensor)
        fault = "" if _is_number(result) else "NumPy reads its value"
        self._ask(func, args, result, fault)

    def size(self, tensor: torch.Tensor) -> None:
        """Record that the code asked for a size that depends on the content."""
        if not self.closed:
            self._know(tensor)
            self._ask(_shape_of, (tensor,), _shape_of(tensor), "")

    def close(self) -> None:
        """Ignore all later operations."""
        self.closed = True

    def _ask(self, func: Any, args: Any, result: Any, fault: str) -> None:
        steps = 0
        for tensor in _tensors(args):
            steps |= self._from.get(self._ref(tensor).storage, 0)
        key = (getattr(func, "__name__", ""), steps)
        if key in self._seen:
            return
        self._seen.add(key)
        self._steps.append(_Step(func, self._refs(args), {}, (), 0, fault))
        self._look(steps | 1 << (len(self._steps) - 1), result, fault)

    def _look(self, steps: int, result: Any, fault: str) -> None:
        chosen = tuple(step for index, step in enumerate(self._steps) if steps >> index & 1)
        used = {ref for step in chosen for ref in _refs_in((step.args, step.kwargs))}
        storages = {ref.storage for ref in used}
        inputs = {name: ref for name, ref in self._inputs.items() if ref.storage in storages}
        written = {
            ref.storage
            for step in chosen
            for ref in _refs_in(tuple(_written(step.func, step.args, step.kwargs)))
        }
        program = _Program(
            inputs,
            {ref: self._constants[ref] for ref in used if ref in self._constants},
            chosen,
            any(ref.storage in written for ref in inputs.values()),
        )
        fault = fault or next((step.fault for step in chosen if step.fault), "")
        if len(self.looks) >= MAX_LOOKS:
            fault = f"the code looks at values more than {MAX_LOOKS} times"
        self.looks.append(Look(repr(result), program, fault))

    def _know(self, tensor: torch.Tensor) -> None:
        """Treat a tensor that no recorded operation made as a constant."""
        ref = self._ref(tensor)
        if ref.storage in self._from or ref in self._made or ref in self._constants:
            return
        self._fixed.add(ref.storage)
        if is_wrapper(tensor):
            self._faults[ref] = f"it uses a {type(tensor).__name__}, which holds other tensors"
        elif StorageWeakRef(tensor.untyped_storage()) in self._own:
            self._constants[ref] = tensor
        elif tensor.numel() <= CONSTANT_ELEMENTS:
            self._constants[ref] = tensor.clone()
        else:
            self._faults[ref] = "it uses a large tensor that is not a parameter"

    def _ref(self, tensor: torch.Tensor) -> _Ref:
        memory = StorageWeakRef(tensor.untyped_storage())
        number = self._numbers.get(memory)
        if number is None:
            number = self._numbers[memory] = self._next
            self._next += 1
        return _Ref(
            number,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            tensor.dtype,
        )

    def _refs(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            inner = _unwrapped(value)
            return self._ref(inner) if _has_sizes(inner) else None
        if isinstance(value, dict):
            return {name: self._refs(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._refs(each) for each in value]
        if isinstance(value, tuple):
            return tuple(self._refs(each) for each in value)
        return value

    def _forget_freed(self) -> None:
        """See Note [Freed memory] in ``looks``."""
        if len(self._numbers) > self._limit:
            for memory in [memory for memory in self._numbers if memory.expired()]:
                self._from.pop(self._numbers.pop(memory), None)
            self._limit = len(self._numbers) + 256


@dataclass
class _Call:
    """An operation that is about to run."""

    func: Any
    args: Any
    kwargs: Any
    read: list[_Ref] = field(default_factory=list)
    written: list[_Ref] = field(default_factory=list)
    elements: int = 0
    fault: str = ""


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _has_sizes(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has one size for each dimension, as sparse and nested ones don't.

    A nested tensor says that its layout is strided all the same.
    """
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_strided(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and _has_sizes(value)
        and not _functorch.is_functorch_wrapped_tensor(value)
    )


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for leaf in leaves(values):
        if isinstance(leaf, torch.Tensor):
            inner = _unwrapped(leaf)
            if _has_sizes(inner):
                yield inner


def _refs_in(values: Any) -> Iterator[_Ref]:
    if isinstance(values, _Ref):
        yield values
    elif isinstance(values, dict):
        yield from _refs_in(tuple(values.values()))
    elif isinstance(values, list | tuple):
        for each in values:
            yield from _refs_in(each)


def _fault(func: Any, values: Any) -> str:
    """Return why a guard must not contain an operation; empty if it may."""
    packet = getattr(func, "overloadpacket", None)
    name = str(getattr(packet, "__name__", func))
    if any(part in name for part in _HEAVY):
        return f"it is computed by {name}, and a guard must be much faster than the pass"
    if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
        return "it depends on random numbers"
    for leaf in leaves(values):
        if isinstance(leaf, torch.Tensor) and not _is_strided(leaf):
            return "it depends on a tensor that is sparse, nested or inside torch.vmap"
        if isinstance(leaf, torch.Tensor) and (leaf.is_conj() or leaf.is_neg()):
            return "it depends on a complex tensor that is conjugated lazily"
    return ""


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Yield the arguments that an operation writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                value = _unwrapped(value)
                if _has_sizes(value):
                    yield value
            elif isinstance(value, _Ref):
                yield value
            elif isinstance(value, list | tuple):
                yield from (each for each in value if isinstance(each, torch.Tensor | _Ref))


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_number, value))
    return isinstance(value, bool | int | float | complex)


def why_not(look: Look, elements: int) -> str:
    """Return why there is no guard for a look; empty if there is one.

    Args:
        look: The look.
        elements: The elements that the whole pass touches.
    """
    if look.fault:
        return look.fault
    if len(look.program.steps) > MAX_STEPS:
        return f"finding the value takes more than {MAX_STEPS} operations"
    mine = look.program.elements
    if mine > FREE_ELEMENTS and mine > SHARE * elements:
        return f"finding the value takes {mine / elements:.0%} of the pass"
    return ""


def in_words(outcome: Outcome) -> str:
    """Return an outcome as text for messages."""
    return listed(each if len(each) <= 40 else f"{each[:37]}..." for each in outcome)


def is_fraction(value: str) -> bool:
    """Return whether a look gave floating-point numbers, which have very many possible values."""
    return re.search(r"\.|\de|inf|nan", value) is not None


def is_subsequence(looks: Sequence[Look], of: Sequence[Look]) -> bool:
    """Return whether another pass has all these looks, in order and with the same outcomes."""
    rest = iter(of)
    return all(
        any(look.outcome == other.outcome and look.path == other.path for other in rest)
        for look in looks
    )


@dataclass
class _Node:
    """A look and the node after each of its outcomes; without a look, the end of the pass."""

    program: _Program | None = None
    after: dict[str, _Node] = field(default_factory=dict)


class GuardTree:
    """Finds the outcomes of batches of one shape; see Note [How a guard is made].

    Safe to share between threads.
    """

    def __init__(self) -> None:
        self._root: _Node | None = None
        self._leaves = 0
        self._lock = threading.Lock()

    def outcome(self, x: Batch) -> Outcome | None:
        """Return the outcome of a batch; None if no recorded pass had the same outcome.

        It is also None if an operation fails, as the model itself then fails too.

        Args:
            x: The batch, on the model's device and in its dtypes; it is not changed.
        """
        node, found = self._root, []
        with torch.inference_mode():
            while node is not None and node.program is not None:
                try:
                    found.append(node.program.run(x))
                except Exception:  # noqa: BLE001 - an operation may raise anything
                    _log.info("a guard fails", exc_info=True)
                    return None
                node = node.after.get(found[-1])
        return None if node is None else tuple(found)

    @property
    def full(self) -> bool:
        """Whether it has the maximum number of outcomes."""
        return self._leaves >= MAX_LEAVES

    @property
    def cheap(self) -> bool:
        """Whether each look is so cheap that any thread may run it."""
        return self._root is None or all(
            program.elements < FEW_ELEMENTS for program in _programs(self._root)
        )

    def add(self, looks: Sequence[Look]) -> bool:
        """Add the looks of a pass; return whether they are consistent with earlier passes."""
        with self._lock:
            if self._root is None:
                self._root, self._leaves = _chain(looks), 1
                return True
            node = self._root
            for index, look in enumerate(looks):
                if node.program is None:
                    return False  # A pass with the same outcomes ended its looks here.
                known = node.after.get(look.outcome)
                if known is None:
                    if self._leaves < MAX_LEAVES:
                        # Complete before any reader can see it.
                        node.after[look.outcome] = _chain(looks[index + 1 :])
                        self._leaves += 1
                    return True
                node = known
            return node.program is None


def _chain(looks: Sequence[Look]) -> _Node:
    node = _Node()
    for look in reversed(looks):
        node = _Node(look.program, {look.outcome: node})
    return node


def _programs(node: _Node) -> Iterator[_Program]:
    if node.program is not None:
        yield node.program
    for each in list(node.after.values()):
        yield from _programs(each)
