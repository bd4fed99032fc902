"""Turns torch.compile off for a model.

Note [Without torch.compile]
    torch.compile runs another program in place of the modules: hooks don't fire in it, or are
    compiled into it, and what it computes differs in the last digits. So layertap serves what the
    modules themselves return, and compiles them in its own ways, with a proof.

    A compiled function that a model calls stays compiled: no layer is inside it. So does whatever
    has more around it than torch.compile, such as autocast around a compiled ``forward``, or a hook
    on what torch.compile returned: without that, the model would compute something else.
"""

from __future__ import annotations

import sys
import types
from typing import Any, cast

from torch import nn

__all__ = ["without_torch_compile"]


def without_torch_compile(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return a model that runs its modules as they are, and the paths of those that were compiled.

    Args:
        module: The model; modules inside it are replaced and changed. Its own path is ``""``.
    """
    compiled: list[str] = []
    if _is_compiled(module):
        module = _inside(module)
        compiled.append("")
    for path, parent in list(module.named_modules()):
        if _turn_off(parent):
            compiled.append(path)
        for name, child in list(parent._modules.items()):
            if child is not None and _is_compiled(child):
                parent._modules[name] = _inside(child)
                compiled.append(f"{path}.{name}".lstrip("."))
    return module, list(dict.fromkeys(compiled))


def _is_compiled(module: nn.Module) -> bool:
    # Its class can't be imported without the compiler, which takes a second. If that was not
    # imported yet, nothing is compiled.
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return (
        frames is not None
        and isinstance(module, frames.OptimizedModule)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _inside(module: nn.Module) -> nn.Module:
    while _is_compiled(module):
        module = cast(nn.Module, module._orig_mod)
    return module


def _turn_off(module: nn.Module) -> bool:
    """Undo ``module.compile()`` and a compiled ``forward``; return whether there was any."""
    found = getattr(module, "_compiled_call_impl", None) is not None
    if found:
        vars(module)["_compiled_call_impl"] = None
    forward = getattr(module, "forward", None)
    function = forward.__func__ if isinstance(forward, types.MethodType) else forward
    plain = _plain(function)
    if plain is function:
        return found
    # A method that was compiled on the instance is bound already; one of the class is a function.
    bound = plain if isinstance(plain, types.MethodType) else types.MethodType(plain, module)
    vars(module)["forward"] = bound
    return True


def _plain(function: Any) -> Any:
    """Return the function that torch.compile was given, or the function itself."""
    # A decorator around a compiled function copies its attributes; the id tells them apart.
    while getattr(function, "_torchdynamo_wrapper_id", None) == id(function) and not getattr(
        function, "_torchdynamo_disable", False
    ):
        function = function._torchdynamo_orig_callable
    return function
