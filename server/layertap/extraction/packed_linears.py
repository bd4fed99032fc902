"""Packs the weights of linear layers in a compiled program, which makes them faster on a CPU.

Note [Packed weights]
    A matrix product computes on blocks of the weights, which MKL copies out of the matrix first, at
    each call. For a text of 128 tokens each weight is used 128 times only, so this takes a good
    part of the time. The weights of a compiled program never change, so they can be copied into
    blocks once, when the program is made. MKL does this for a given number of rows, which are the
    tokens of a pass. So the weights are packed for one number of rows, that of a given example. For
    any other number torch's operation computes with the weights as they are.

    MKL's operation does not check the size of a row. If it were given rows of another size than the
    weights have, it would read other memory. So a view before it checks that size, as torch's own
    operation does.

    torch's own ``optimize_for_inference`` packs convolutions, but not linear layers.

Note [Packed once]
    Packed weights are copies. A model has many programs: one for each set of layers, outcome and
    size of item. Those with as many rows share the packed weights, which are freed with the last
    program that uses them. The packed weights of all models together take at most
    `MAX_PACKED_BYTES`; programs whose weights don't fit keep them as they are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["MAX_PACKED_BYTES", "pack_linears"]

MAX_PACKED_BYTES = 1 << 30
"""Maximum bytes of packed weights in this process."""

ROWS = range(8, 4097)
"""Numbers of rows for which weights are packed.

For fewer rows, reading the weights should take the time, and for more, packing them at each call a
small part of it. Only 128 rows were measured.
"""


class _Key(NamedTuple):
    """Identifies packed weights.

    Attributes:
        memory: A weak reference to the weights' memory, so that memory of freed weights is not
            taken for that of later ones.
        offset: The first element in that memory.
        shape: The shape of the weights.
        rows: The number of rows for which they are packed.
    """

    memory: StorageWeakRef
    offset: int
    shape: tuple[int, ...]
    rows: int

    @property
    def nbytes(self) -> int:
        """The bytes of the packed weights."""
        return 4 * math.prod(self.shape)


_packed: WeakValueDictionary[_Key, torch.Tensor] = WeakValueDictionary()
_lock = threading.Lock()


def pack_linears(
    program: torch.jit.ScriptModule, example: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Pack the weights of a frozen program's linear layers; see Note [Packed weights].

    Args:
        program: A frozen program; it is changed in place, and can't be saved any more.
        example: The inputs for which it becomes faster, in order. The program runs on them once.

    Returns:
        The packed weights. Hold them as long as the program, so that other programs can share them.
    """
    # An optimised operation of MKL, which torch may be built without.
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return []
    graph = program.graph
    linears = _linears(graph)
    if not linears:
        return []
    keys = [
        _key(weight, rows // weight.shape[1])
        for (_, weight), rows in zip(linears, _elements(graph, example), strict=True)
    ]
    chosen = [
        (node, weight, key)
        for (node, weight), key in zip(linears, keys, strict=True)
        if key.rows in ROWS
    ]
    packed = _packed_for({key: weight for _, weight, key in chosen})
    if packed:
        for node, _, key in chosen:
            _replace(graph, node, packed[key], key.rows)
        torch._C._jit_pass_dce(graph)
    return list(packed.values())


def _linears(graph: Any) -> list[tuple[Any, torch.Tensor]]:
    """Return the linear layers whose weights can be packed, and the weights."""
    nodes = [node for node in graph.nodes() if node.kind() == "aten::linear"]
    return [(node, weight) for node in nodes if (weight := _weight(node)) is not None]


def _weight(node: Any) -> torch.Tensor | None:
    _, *parameters = node.inputs()
    if any(value.node().kind() != "prim::Constant" for value in parameters):
        return None
    weight, bias = (value.toIValue() for value in parameters)
    plain = all(value is None or _is_plain(value) for value in (weight, bias))
    return weight if plain and weight.ndim == 2 and weight.numel() else None


def _is_plain(value: torch.Tensor) -> bool:
    return (
        value.dtype is torch.float32
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_contiguous()
        and not value.requires_grad
    )


def _elements(graph: Any, example: Mapping[str, torch.Tensor]) -> Sequence[int]:
    """Run a program up to its linear layers, and return the elements of what each is given."""
    counting = graph.copy()
    counts = []
    for node, _ in _linears(counting):
        given = next(iter(node.inputs()))
        count = counting.create("aten::numel", [given], 1).insertAfter(node).output()
        count.setType(torch._C.IntType.get())
        counts.append(count)
    for _ in list(counting.outputs()):
        counting.eraseOutput(0)
    result = counting.appendNode(counting.create("prim::ListConstruct", counts, 1)).output()
    result.setType(torch._C.ListType.ofInts())
    counting.registerOutput(result)
    torch._C._jit_pass_dce(counting)
    if next(iter(counting.inputs())).uses():
        return [0] * len(counts)  # The program is not frozen whole.
    counting.eraseInput(0)
    run = torch._C._create_function_from_graph("rows", counting)
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        elements: list[int] = run(*(tensor.clone() for tensor in example.values()))
    return elements


def _key(weight: torch.Tensor, rows: int) -> _Key:
    memory = StorageWeakRef(weight.untyped_storage())
    return _Key(memory, int(weight.storage_offset()), tuple(weight.shape), rows)


def _packed_for(weights: Mapping[_Key, torch.Tensor]) -> dict[_Key, torch.Tensor]:
    """Return the packed weights for some keys; none if they don't fit the limit."""
    with _lock:
        known = dict(_packed)
        missing = weights.keys() - known.keys()
        taken = sum(key.nbytes for key in known)
        if taken + sum(key.nbytes for key in missing) > MAX_PACKED_BYTES:
            return {}
        for key in missing:
            packed = torch.ops.mkl._mkl_reorder_linear_weight(weights[key], key.rows)
            known[key] = _packed[key] = packed
        return {key: known[key] for key in weights}


def _replace(graph: Any, node: Any, packed: torch.Tensor, rows: int) -> None:
    x, weight, bias = node.inputs()
    with graph.insert_point_guard(node):
        count, last, size = map(graph.insertConstant, (rows, -1, [weight.toIValue().shape[1]]))
    checked = graph.create("aten::unflatten", [x, last, size], 1).insertBefore(node)
    constant = graph.create("prim::ConstantMKLDNNTensor", [], 1).insertBefore(node)
    constant.t_("value", packed)
    given = [checked.output(), constant.output(), weight, bias, count]
    linear = graph.create("mkl::_mkl_linear", given, 1).insertBefore(node)
    node.output().replaceAllUsesWith(linear.output())
