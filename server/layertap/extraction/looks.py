"""Whether a model's own code looks at values that follow its input.

Note [Looks]
    ``if x.max() > 1:`` asks a tensor for a Python number. A trace keeps the way that the example
    took, for every input to come, and says so in a warning that it also gives for harmless things.
    So the model is run once with every operation watched: what is computed of the input is marked,
    by its memory, and a number that is taken out of marked memory is a look. Shapes are numbers
    without any tensor in an eager pass, and parameters are not marked, so neither counts.

    Not seen: a size that follows the content (``len(boxes)``), which a trace keeps right as long as
    nobody turns it into a Python number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Looks", "watch_looks"]

# Each takes values of a tensor to Python: bool(), int(), item() and comparisons of whole tensors.
# In inference mode composite operations are seen as a whole, else their last part.
_LOOKS = {
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
}
# These do so without an operation.
_EXPORTS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


class Looks:
    """What has been seen so far.

    Attributes:
        count: How often the model looked.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.count = 0
        # Weak, so that the pass needs no more memory; but the address of what is gone stays taken.
        self._marked = {StorageWeakRef(x.untyped_storage())}

    def marked(self, values: Any) -> bool:
        """Tell whether some tensor among the values follows the input."""
        return any(
            StorageWeakRef(leaf.untyped_storage()) in self._marked
            for leaf in tree_leaves(values)
            if isinstance(leaf, torch.Tensor)
        )

    def mark(self, values: Any) -> None:
        """Note that the tensors among the values follow the input."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                self._marked.add(StorageWeakRef(leaf.untyped_storage()))


class _Operations(TorchDispatchMode):
    def __init__(self, looks: Looks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._looks = looks

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        follows = self._looks.marked((args, kwargs))
        result = func(*args, **kwargs)
        if follows:
            self._looks.count += func in _LOOKS
            # In-place operations return what they wrote to; so do those with an out argument.
            self._looks.mark(result)
        return result


class _Exports(TorchFunctionMode):
    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self._looks = looks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _EXPORTS and self._looks.marked(args):
            self._looks.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watch_looks(module: nn.Module, x: torch.Tensor) -> Iterator[Looks]:
    """Watch the forward passes of a model on ``x`` in the block, in this thread.

    A TorchScript program is not watched: its branches are its own, and stay in it.
    """
    looks = Looks(x)
    if isinstance(module, torch.jit.ScriptModule):
        yield looks
        return
    with _Exports(looks), _Operations(looks):
        yield looks
