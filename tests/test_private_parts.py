"""The private parts of other libraries that layertap uses exist, and no others are used.

None has a public counterpart. Where a test here fails after an update, that private part moved:
look for the code that uses it (``git grep NAME server``).
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from torch import nn

from layertap.threads import run_in

SERVER = Path(__file__).resolve().parent.parent / "server" / "layertap"

# Of the standard library, private by name only: these are documented.
DOCUMENTED = {"_exit", "_asdict", "_fields", "_replace", "_value_"}

# Of our own, used outside the file that defines them.
SHARED = {"_shared_memory"}  # BaseClient's, for AsyncClient

ATTRIBUTES = {
    *("_functorch", "_aoti", "_C"),  # torch
    *("_embedding_bag", "_embedding_bag_forward_only", "_nested_tensor_from_mask_left_aligned"),
    *("_jit_pass_dce", "_create_function_from_graph", "_mkl_reorder_linear_weight"),
    *("_jit_pass_dce_graph", "_recursive"),  # watched by extraction/test_kept_programs.py
    *("_c", "_method_names", "_get_method", "_type"),  # torch.jit.ScriptModule
    *("_version", "_cdata", "_metadata"),  # tensors, storages and state dicts
    "_saved_input",  # the nodes of autograd's graph
    *("_forward_hooks", "_forward_pre_hooks", "_modules"),  # torch.nn.Module
    # What torch.compile makes of modules and functions; watched by models/test_eager.py.
    *("_orig_mod", "_torchdynamo_orig_callable"),
    "_bit_generator",  # numpy.random.RandomState
    "_from_config",  # transformers.PreTrainedModel
}
MODULES = {
    *("torch._C", "torch.utils._python_dispatch", "torch.utils._pytree"),
    "torch._inductor",
    *("torchvision.models._utils", "torchvision.transforms._presets"),
}


def trees() -> Iterator[ast.Module]:
    """Parse every module that is written by hand."""
    for file in SERVER.rglob("*.py"):
        if "_pb2" not in file.name and "_pure" not in file.parts:
            yield ast.parse(file.read_text("utf-8"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def our_own(tree: ast.Module) -> set[str]:
    """Name what a module of ours defines: functions, classes, variables, fields, attributes."""
    return set(_definitions(tree))


def _definitions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            yield node.attr


def attributes(tree: ast.Module) -> set[str]:
    """Name the private attributes that a module uses."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in found if private(name)}


def test_no_other_private_part_is_used() -> None:
    """A private attribute or module of another library is used only if it is listed here."""
    parsed = list(trees())
    nodes = [node for tree in parsed for node in ast.walk(tree)]
    # A file may use the private names that it defines. The same name in another file may belong to
    # another library.
    used = {name for tree in parsed for name in attributes(tree) - our_own(tree)}
    used -= DOCUMENTED | SHARED
    assert used <= ATTRIBUTES, "use the public way, or list it and add a test that watches it"
    imports = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {name for name in imports if any(map(private, name.split(".")))}
    foreign = {name for name in modules if not name.startswith("layertap.")}
    assert foreign <= MODULES, "use the public way, or list it and add a test that watches it"
    assert used >= ATTRIBUTES, "this is used no more: take it off the list"
    assert foreign == MODULES, "this is used no more: take it off the list"


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_grpc_runs_a_behaviour_in_its_own_threads(kind: str) -> None:
    """gRPC still looks for ``experimental_thread_pool``, by which health and refusals have threads.

    Without it they would wait for the threads that serve extraction.
    """
    seen: list[str] = []

    def answer(message: object, context: grpc.ServicerContext) -> bytes:
        seen.append(threading.current_thread().name)
        return b""

    def answers(message: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield answer(message, context)

    own = ThreadPoolExecutor(1, thread_name_prefix="own")
    handler = (
        grpc.unary_unary_rpc_method_handler(run_in(own, answer))
        if kind == "unary"
        else grpc.unary_stream_rpc_method_handler(run_in(own, answers))
    )
    service = grpc.method_handlers_generic_handler("a", {"B": handler})
    server = grpc.server(ThreadPoolExecutor(1, thread_name_prefix="servers"), handlers=[service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            if kind == "unary":
                channel.unary_unary("/a/B")(b"", timeout=30)
            else:
                list(channel.unary_stream("/a/B")(b"", timeout=30))
    finally:
        server.stop(None).wait()
        own.shutdown()
    assert [name.rpartition("_")[0] for name in seen] == ["own"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3).eval(), nn.InstanceNorm2d(3)])
def test_the_nodes_of_norms_have_their_input(norm: nn.Module) -> None:
    """``_saved_input`` of a batch norm's node, which instance norms have too, has its strides."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        waiting, found = [norm(x).grad_fn], []
        while waiting:
            node = waiting.pop()
            waiting += [each for each, _ in node.next_functions if each is not None]
            if "BatchNormBackward" in node.name():
                found.append(node._saved_input)
    assert len(found) == 1
    assert found[0].numel() == x.numel()


def test_functorch_tells_wrapped_tensors() -> None:
    """``torch._C._functorch`` recognises a tensor inside torch.vmap, and unwraps it."""
    from torch._C import _functorch

    def look(x: torch.Tensor) -> torch.Tensor:
        assert _functorch.is_functorch_wrapped_tensor(x)
        assert _functorch.get_unwrapped(x).shape == (2, 3)
        return x

    torch.vmap(look)(torch.zeros(2, 3))
    assert not _functorch.is_functorch_wrapped_tensor(torch.zeros(2, 3))


def test_operations_of_torch_have_their_names() -> None:
    """The operations that show looks at values and at tables exist."""
    assert callable(torch._nested_tensor_from_mask_left_aligned)
    for overload in (
        torch.ops.aten._embedding_bag.default,
        torch.ops.aten._embedding_bag_forward_only.default,
    ):
        assert overload.name().startswith("aten::_embedding_bag")


def test_dispatch_modes_see_every_operation() -> None:
    """``TorchDispatchMode`` is called for each operation, and ``tree_leaves`` finds its tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    leaves: list[object] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            leaves.extend(tree_leaves((args, kwargs)))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        torch.stack([x, x])
    assert sum(leaf is x for leaf in leaves) == 2


class Program(nn.Module):
    """A net for TorchScript with a second method and an attribute that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count the call."""
        self.calls += 1
        return self.other(x)

    @torch.jit.export
    def other(self, x: torch.Tensor) -> torch.Tensor:
        """Return twice the input."""
        return x * 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_show_their_methods_and_attributes() -> None:
    """A TorchScript module's ``_c`` lists its methods, their graphs and its attributes."""
    compiled = torch.jit.script(Program())._c
    assert set(compiled._method_names()) >= {"forward", "other"}
    assert compiled._get_method("forward").graph.findAllNodes("prim::SetAttr")
    assert compiled.getattr("calls") == 0
    assert "Program" in str(compiled._type())
    assert isinstance(compiled, torch._C.ScriptModule | torch._C.ScriptObject)


def test_tensors_count_their_writes_and_share_storages() -> None:
    """``_version`` increases with a write; ``_cdata`` belongs to the memory, not to the view."""
    with torch.inference_mode(mode=False):
        x = torch.zeros(4)
        before = x._version
        x.add_(1)
        assert x._version > before
    assert x.untyped_storage()._cdata == x[:2].untyped_storage()._cdata
    assert x.untyped_storage()._cdata != x.clone().untyped_storage()._cdata


def test_modules_have_the_tables_that_passes_look_into() -> None:
    """A module keeps hooks, parameters, buffers and children in these dictionaries."""
    from layertap.extraction.state import walk

    tables = (*walk.HOOKS, *walk._OTHER_HOOKS, *walk._MODULE_TABLES)
    assert [name for name in tables if name not in vars(nn.Linear(1, 1))] == []
    child = nn.Identity()
    assert nn.ModuleDict({"a": child, "b": child})._modules == {"a": child, "b": child}
    net = nn.Linear(1, 1)
    net.register_forward_hook(lambda *_: None)
    net.register_forward_pre_hook(lambda *_: None)
    assert net._forward_hooks
    assert net._forward_pre_hooks


def test_state_dicts_carry_versions() -> None:
    """``state_dict()`` has the modules' versions as ``_metadata``, which loading reads."""
    metadata = nn.Sequential(nn.BatchNorm2d(1)).state_dict()._metadata
    assert metadata["0"]["version"] == 2


def test_numpy_keeps_its_old_generators_state() -> None:
    """``RandomState._bit_generator`` holds the state of numpy's old generators."""
    generator = np.random.RandomState(0)
    state = generator._bit_generator.state
    first = generator.random_sample()
    generator._bit_generator.state = state
    assert generator.random_sample() == first


def test_transformers_make_models_without_weights() -> None:
    """``_from_config`` of a model's class makes it of a configuration, with random weights.

    Only the automatic classes have a public ``from_config``.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    assert isinstance(BertModel._from_config(config), BertModel)
    assert not hasattr(BertModel, "from_config")


def test_torchvision_names_its_presets() -> None:
    """The transforms of torchvision's weights have the classes that preprocessing knows."""
    from torchvision.models import ResNet18_Weights
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.transforms._presets import (
        ImageClassification,
        ObjectDetection,
        SemanticSegmentation,
    )

    assert isinstance(ResNet18_Weights.DEFAULT.transforms(), ImageClassification)
    assert callable(ObjectDetection)
    assert callable(SemanticSegmentation)
    assert issubclass(IntermediateLayerGetter, nn.ModuleDict)


def test_handles_become_tensors_and_back() -> None:
    """``torch._C._aoti`` gives a capsule with a handle of a tensor, and the tensor for a handle."""
    x = torch.arange(6.0).view(2, 3)
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([x])
    (again,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
    assert again.data_ptr() == x.data_ptr()
    assert torch.equal(again, x)
