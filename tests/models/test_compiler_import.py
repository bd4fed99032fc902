"""Torch's compiler is imported by what needs it, not by the start of a server."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = "import sys, layertap.app.lifecycle"


def run(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_server_starts_without_the_compiler() -> None:
    """Neither it nor what it imports is there, and its name leads to nothing else."""
    print_them = "print([n for n in sys.modules if n.startswith(('torch._dynamo', 'sympy'))])"
    assert run(f"{START}; {print_them}") == "[]"


@pytest.mark.long
def test_the_compiler_can_be_imported_afterwards() -> None:
    """Its own module has the name again, and torch.compile works as if nothing had been."""
    code = """
import torch
import torch._dynamo.utils as utils
print(utils.__file__ is not None, utils.__name__)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""
    assert run(f"{START}\n{code}").split() == ["True", "torch._dynamo.utils", "2.0"]


@pytest.mark.long
def test_torchvision_asks_the_real_compiler() -> None:
    """The function that torchvision imported answers as the compiler's own."""
    code = """
import importlib
align = importlib.import_module("torchvision.ops.roi_align")
mine = align.is_compile_supported("cpu")
from torch._dynamo.utils import is_compile_supported
print(mine == is_compile_supported("cpu"), "torch._dynamo" in sys.modules)
"""
    got = run(f"{START}\n{code}")
    assert got.split() == ["True", "True"]


@pytest.mark.long
def test_a_program_that_has_the_compiler_keeps_it() -> None:
    """If it is imported first, torchvision gets it."""
    first = "import sys, torch._dynamo.utils as u"
    then = "import layertap.models; print(sys.modules[u.__name__] is u)"
    assert run(f"{first}; {then}") == "True"
