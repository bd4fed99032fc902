"""Detects how a model's code uses values that depend on its input, for example in branches.

Note [Looks]
    ``if x.max() > 1:`` asks a tensor for a Python number. A trace keeps the branch that the example
    took for every later input. torch only warns of this, and it gives the same warning for harmless
    code. So the model runs once with every operation watched. Whatever is computed from the input
    is marked by its memory, and taking a number out of marked memory is a look. In an eager pass
    shapes are plain numbers, not tensors, and parameters are not marked, so neither counts.

    A size that depends on the content (``len(boxes)``) is such a number too, though no operation
    shows it. A trace handles it correctly until the code branches on it or loops over it. So values
    with such a size are marked as well, and asking them for their size is a look.

    Where a `Tape` of ``guards`` is given, it records every operation, so that the value of each
    look can be found out for other input.

Note [Code in Python]
    A ``torch.autograd.Function`` is Python code that a compiled program can't contain. We see the
    calls of its ``apply`` with the interpreter's profiling hook, which applies to this thread only.
    Patching ``apply`` would change it for the passes of all other threads.

    The same is true of the operations of tensors whose class defines them in Python, such as
    quantised weights (Note [Wrapper subclasses]). torch names these classes with each operation.

Note [Freed memory]
    Marks are weak references to the memory of tensors. A mark of freed memory keeps a small header
    allocated between the freed buffers. The allocator can then neither join nor return the buffers,
    and a pass takes many times its own memory. So marks of freed memory are dropped soon.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layertap.extraction.guards import Tape
from layertap.extraction.leaves import leaves
from layertap.extraction.steps import discrete_results, is_new, keeps_exact
from layertap.listing import listed
from layertap.models.compiler_import import import_compiler
from layertap.models.tensor_content import computes_in_python

__all__ = ["Looks", "unwatched", "watch_looks"]

# torch tags the operations that take values of a tensor to Python (item() and comparisons of whole
# tensors), except this one. Inference mode shows composite operations as a whole; otherwise we see
# their last part.
_LOOKS = {torch.ops.aten.is_nonzero.default}
# These take values to Python without a dispatched operation.
_EXPORTS = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    # Decides in ``nn.TransformerEncoder`` whether padded tokens are packed into a nested tensor.
    torch._nested_tensor_from_mask_left_aligned,
}
# Composite operations whose results' sizes depend on the content; torch tags only their parts.
_SIZED = {
    torch.ops.aten.where.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.repeat_interleave.self_Tensor,
}
# Their first argument is a table whose number of rows limits the ids in the second.
_LOOK_UPS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.embedding_bag.default,
    torch.ops.aten.embedding_bag.padding_idx,
    torch.ops.aten._embedding_bag.default,
    torch.ops.aten._embedding_bag_forward_only.default,
}
_ASKS_SIZE = {
    torch.Tensor.__len__,
    torch.Tensor.__iter__,
    torch.Tensor.numel,
    torch.Tensor.size,
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.unbind,
}


SLACK = 32
"""Marks of freed memory that may accumulate; dropping them is slow, as it checks every mark."""


class _Eyes(threading.local):
    closed = False


_eyes = _Eyes()


class Looks:
    """What the watched passes have done so far.

    Attributes:
        count: How often the model looked at values; see Note [Looks].
        operations: How many operations had arguments that depend on the input.
        sizes: Whether the size of some value depended on the content of the input.
        python: What it ran that is code in Python and no part of a compiled program, as clauses
            about the model; see Note [Code in Python].
        tables: The numbers of rows of the tables that it indexed by ids from the input.
    """

    def __init__(self, given: Any) -> None:
        self.count = 0
        # Weak, so that the pass needs no more memory; see Note [Freed memory].
        self._marked = set(_memory(given))
        self._sized: set[StorageWeakRef] = set()
        self._inexact: set[StorageWeakRef] = set()
        self._steps: dict[StorageWeakRef, str] = {}
        self._limit = SLACK
        self.operations = 0
        self.sizes = False
        self.python: list[str] = []
        self.tables: set[int] = set()

    def marked(self, values: Any) -> bool:
        """Return whether any tensor among the values depends on the input."""
        return self.any_marked(_memory(values))

    def any_marked(self, memory: Iterable[StorageWeakRef]) -> bool:
        """Return whether any of the memory holds what depends on the input."""
        return not self._marked.isdisjoint(memory)

    def sized(self, values: Any) -> bool:
        """Return whether the size of any tensor among the values depends on the content."""
        return not self._sized.isdisjoint(_memory(values))

    def step(self, values: Any) -> str:
        """Return a discontinuous operation that a tensor among the values depends on.

        See Note [Discontinuous steps]; empty if there is none.
        """
        return self._step_of(_memory(values))

    def _step_of(self, memory: Iterable[StorageWeakRef]) -> str:
        return next((self._steps[each] for each in memory if each in self._steps), "")

    def follow(
        self, func: Any, args: tuple[Any, ...], given: Collection[StorageWeakRef], result: Any
    ) -> None:
        """Record what an operation on values that depend on the input has made of them.

        Args:
            func: The operation.
            args: Its positional arguments.
            given: The memory of all its arguments.
            result: What it returned.
        """
        self.operations += 1
        self.count += _takes_numbers(func)
        made = list(_memory(result))
        if self._makes_sizes(func, args) or not self._sized.isdisjoint(given):
            self.sizes = True
            self._sized.update(made)
        self._note_tables(func, args)
        self._note_steps(func, args, given, result, made)
        # In-place operations return what they wrote to; so do operations with an out argument.
        self._marked.update(made)
        self._forget_freed()

    def _note_steps(
        self,
        func: Any,
        args: tuple[Any, ...],
        given: Collection[StorageWeakRef],
        result: Any,
        made: Collection[StorageWeakRef],
    ) -> None:
        """Record which results of an operation are inexact, and which depend on a step."""
        before = self._step_of(given)
        if before:
            self._steps.update(dict.fromkeys(made, before))
        inexact = not self._inexact.isdisjoint(given)
        if inexact:
            for value in discrete_results(func, args, result):
                self._steps.update(dict.fromkeys(_memory(value), func.overloadpacket.__name__))
        if inexact or not keeps_exact(func):
            self._inexact.update(_memory([v for v in leaves(result) if _may_be_rounded(v)]))

    def _note_tables(self, func: Any, args: tuple[Any, ...]) -> None:
        """Record the table if an operation looks up ids from the input in a constant table."""
        if func in _LOOK_UPS and not self.marked(args[0]):
            self.tables.add(len(args[0]))
        elif func is torch.ops.aten.index.Tensor and not self.marked(args[0]):
            picked = [(axis, ids) for axis, ids in enumerate(args[1]) if self.marked(ids)]
            self.tables.update(args[0].shape[axis] for axis, ids in picked if _counts(ids))
        elif func is torch.ops.aten.one_hot.default and args[1] > 0:
            self.tables.add(args[1])

    def _forget_freed(self) -> None:
        """Drop the marks of memory that was freed; see Note [Freed memory]."""
        if len(self._marked) <= self._limit:
            return
        for marks in (self._marked, self._sized, self._inexact):
            marks.difference_update([memory for memory in marks if memory.expired()])
        for memory in [memory for memory in self._steps if memory.expired()]:
            del self._steps[memory]
        self._limit = len(self._marked) + SLACK

    def _makes_sizes(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Return whether the size of an operation's result depends on its arguments' content."""
        if func is torch.ops.aten.index.Tensor:  # Only indexing by a mask, not by numbers.
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            return self.marked(masks)
        return func in _SIZED or torch.Tag.dynamic_output_shape in func.tags


def _memory(values: Any) -> Iterator[StorageWeakRef]:
    for leaf in leaves(values):
        while isinstance(leaf, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(leaf):
            leaf = _functorch.get_unwrapped(leaf)  # noqa: PLW2901 - the tensor inside vmap
        # Sparse tensors have no such memory; what is computed from them and the input is marked.
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            yield StorageWeakRef(leaf.untyped_storage())


def _counts(ids: torch.Tensor) -> bool:
    return ids.dtype not in (torch.bool, torch.uint8)


def _is_function(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


def _may_be_rounded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _takes_numbers(func: Any) -> bool:
    return func in _LOOKS or torch.Tag.data_dependent_output in func.tags


class _Operations(TorchDispatchMode):
    def __init__(self, looks: Looks, tape: Tape | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._looks = looks
        self._tape = tape

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _eyes.closed:
            return func(*args, **kwargs)
        # Among them may be classes without operations of their own, such as Parameter in a copy.
        names = dict.fromkeys(kind.__name__ for kind in types if computes_in_python(kind))
        if names:
            self._looks.python.append(
                f"computes with {listed(names)}, a class of tensors in Python"
            )
        given = list(_memory((args, kwargs)))
        follows = self._looks.any_marked(given) and not is_new(func)
        call = self._tape.before(func, args, kwargs) if self._tape else None
        result = func(*args, **kwargs)
        if self._tape:
            self._tape.after(call, result, looks=follows and _takes_numbers(func))
        if follows:
            self._looks.follow(func, args, given, result)
        return result


class _Exports(TorchFunctionMode):
    def __init__(self, looks: Looks, tape: Tape | None) -> None:
        super().__init__()
        self._looks = looks
        self._tape = tape

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        exports = not _eyes.closed and func in _EXPORTS and self._looks.marked(args)
        asks = not _eyes.closed and func in _ASKS_SIZE and self._looks.sized(args)
        self._looks.count += exports or asks
        if self._tape and asks:
            self._tape.size(args[0])
        result = func(*args, **(kwargs or {}))
        if self._tape and exports:
            self._tape.export(func, args, result)
        return result


@contextmanager
def unwatched() -> Iterator[None]:
    """Don't count what this thread runs inside the block: it is not the model's own code."""
    before, _eyes.closed = _eyes.closed, True
    try:
        yield
    finally:
        _eyes.closed = before


@contextmanager
def watch_looks(module: nn.Module, given: Any, tape: Tape | None = None) -> Iterator[Looks]:
    """Watch the forward passes that this thread runs inside the block.

    Args:
        module: The model.
        given: The tensors that the model is given, in any nesting of containers.
        tape: Records the operations of one pass.
    """
    import_compiler()
    looks = Looks(given)
    with _Exports(looks, tape), _Operations(looks, tape), _watch_functions(looks):
        yield looks


@contextmanager
def _watch_functions(looks: Looks) -> Iterator[None]:
    """Record the autograd functions that are called; see Note [Code in Python]."""
    before = sys.getprofile()

    def see(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == "apply" and _is_function(called.__self__):
            name = called.__self__.__name__
            looks.python.append(f"calls {name}, a Python autograd.Function")

    sys.setprofile(see)
    try:
        yield
    finally:
        # Before Python 3.12 it may be a cProfile.Profile, which is started again, not called.
        again = getattr(before, "enable", None)
        sys.setprofile(None if again else before)
        if again:
            again()
