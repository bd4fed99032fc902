"""Detects how a model's code uses values that depend on its input, for example in branches.

Note [Looks]
    ``if x.max() > 1:`` asks a tensor for a Python number. A trace keeps the way that the example
    took, for every input to come, and says so in a warning that it also gives for harmless things.
    So the model is run once with every operation watched: what is computed of the input is marked,
    by its memory, and a number that is taken out of marked memory is a look. Shapes are numbers
    without any tensor in an eager pass, and parameters are not marked, so neither counts.

    A size that follows the content (``len(boxes)``) is such a number too, though no operation tells
    it: a trace keeps it right until the code branches on it or counts to it. What has such a size
    is marked as well, and asking it for its size is a look.

    Where a `Tape` of ``guards`` is given, it records every operation, so that the value of each
    look can be found out for other input.

Note [Python functions]
    A ``torch.autograd.Function`` is Python code that a compiled program can't hold. Its ``apply``
    is seen by the interpreter's profiling hook, which belongs to this thread alone; patching
    ``apply`` itself would change it for every other thread's pass.

Note [Freed memory]
    Marks are weak references to the memory of tensors. One to memory that was freed keeps its small
    head allocated, between the buffers that were freed: the allocator can then neither join those
    nor return them, and a pass takes many times its own memory. So marks of freed memory are
    dropped soon.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layertap.extraction.guards import Tape
from layertap.extraction.steps import discrete_results, is_new, keeps_exact

__all__ = ["Looks", "unwatched", "watch_looks"]

# torch tags what takes values of a tensor to Python, item() and comparisons of whole tensors, but
# for this one. In inference mode composite operations are seen as a whole, else their last part.
_LOOKS = {torch.ops.aten.is_nonzero.default}
# These do so without an operation that is dispatched.
_EXPORTS = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    # Decides in ``nn.TransformerEncoder`` whether padded tokens are packed into a nested tensor.
    torch._nested_tensor_from_mask_left_aligned,
}
# Composite operations whose results' sizes follow the content; torch tags their parts.
_SIZED = {
    torch.ops.aten.where.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.repeat_interleave.self_Tensor,
}
# Their first argument is a table, by whose rows the ids of the second are bounded.
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
"""Marks of freed memory that may stay for a while: dropping them goes through all marks."""


class _Eyes(threading.local):
    closed = False


_eyes = _Eyes()


class Looks:
    """What has been seen so far.

    Attributes:
        count: How often the model looked.
        operations: How many operations took values that follow the input.
        functions: The names of the Python functions of autograd that it called.
        tables: The rows of the tables in which it looked up ids that follow the input.
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
        self.functions: list[str] = []
        self.tables: set[int] = set()

    def marked(self, values: Any) -> bool:
        """Return whether any tensor among the values depends on the input."""
        return not self._marked.isdisjoint(_memory(values))

    def mark(self, values: Any) -> None:
        """Note that the tensors among the values follow the input."""
        self._marked.update(_memory(values))

    def sized(self, values: Any) -> bool:
        """Return whether the size of some tensor among the values follows the content."""
        return not self._sized.isdisjoint(_memory(values))

    def step(self, values: Any) -> str:
        """Return the discontinuous operation that some tensor among the values follows from.

        See Note [Discontinuous steps]; empty if there is none.
        """
        return next((self._steps[m] for m in _memory(values) if m in self._steps), "")

    def note_steps(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note which results of an operation are inexact, and which follow from a step."""
        before = self.step((args, kwargs))
        if before:
            self._steps.update(dict.fromkeys(_memory(result), before))
        inexact = any(m in self._inexact for m in _memory((args, kwargs)))
        if inexact:
            for value in discrete_results(func, args, result):
                self._steps.update(dict.fromkeys(_memory(value), func.overloadpacket.__name__))
        if inexact or not keeps_exact(func):
            floats = [v for v in tree_leaves(result) if _may_be_rounded(v)]
            self._inexact.update(_memory(floats))

    def note_tables(self, func: Any, args: tuple[Any, ...]) -> None:
        """Note the table of an operation that looks up what follows the input in a constant."""
        if func in _LOOK_UPS and not self.marked(args[0]):
            self.tables.add(len(args[0]))
        elif func is torch.ops.aten.index.Tensor and not self.marked(args[0]):
            picked = [(axis, ids) for axis, ids in enumerate(args[1]) if self.marked(ids)]
            self.tables.update(args[0].shape[axis] for axis, ids in picked if _counts(ids))
        elif func is torch.ops.aten.one_hot.default and args[1] > 0:
            self.tables.add(args[1])

    def forget_freed(self) -> None:
        """Drop the marks of memory that was freed; see Note [Freed memory]."""
        if len(self._marked) <= self._limit:
            return
        for marks in (self._marked, self._sized, self._inexact):
            marks.difference_update([memory for memory in marks if memory.expired()])
        for memory in [memory for memory in self._steps if memory.expired()]:
            del self._steps[memory]
        self._limit = len(self._marked) + SLACK

    def makes_sizes(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Return whether the size of an operation's result follows the content of its arguments."""
        if func is torch.ops.aten.index.Tensor:  # By a mask, not by numbers.
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            return self.marked(masks)
        return func in _SIZED or torch.Tag.dynamic_output_shape in func.tags

    def mark_sized(self, values: Any) -> None:
        """Note that the sizes of the tensors among the values follow the content."""
        self._sized.update(_memory(values))


def _memory(values: Any) -> Iterator[StorageWeakRef]:
    for leaf in tree_leaves(values):
        while isinstance(leaf, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(leaf):
            leaf = _functorch.get_unwrapped(leaf)  # noqa: PLW2901 - what vmap computes with
        # Sparse tensors have none to tell; what is computed of them with the input is marked.
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
        follows = self._looks.marked((args, kwargs)) and not is_new(func)
        call = self._tape.before(func, args, kwargs) if self._tape else None
        result = func(*args, **kwargs)
        if self._tape:
            self._tape.after(call, result, looks=follows and _takes_numbers(func))
        if follows:
            self._looks.operations += 1
            self._looks.count += _takes_numbers(func)
            if self._looks.makes_sizes(func, args) or self._looks.sized((args, kwargs)):
                self._looks.mark_sized(result)
            self._looks.note_tables(func, args)
            self._looks.note_steps(func, args, kwargs, result)
            # In-place operations return what they wrote to; so do those with an out argument.
            self._looks.mark(result)
            self._looks.forget_freed()
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
    """Leave out what runs in the block, in this thread: it is not the model's own code."""
    before, _eyes.closed = _eyes.closed, True
    try:
        yield
    finally:
        _eyes.closed = before


@contextmanager
def watch_looks(module: nn.Module, given: Any, tape: Tape | None = None) -> Iterator[Looks]:
    """Watch the forward passes of a model in the block, in this thread.

    Args:
        module: The model.
        given: The tensors that it is given, in any nesting of containers.
        tape: Records the operations; for one pass.
    """
    looks = Looks(given)
    with _Exports(looks, tape), _Operations(looks, tape), _watch_functions(looks):
        yield looks


@contextmanager
def _watch_functions(looks: Looks) -> Iterator[None]:
    """See Note [Python functions]."""
    before = sys.getprofile()

    def see(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == "apply" and _is_function(called.__self__):
            looks.functions.append(called.__self__.__name__)

    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(before)
