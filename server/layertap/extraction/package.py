"""Packages of AOTInductor: what one consists of, and how this process runs it.

Note [Called through the C interface]
    A package is a shared library. torch's own loader (``AOTIModelPackageLoader``) runs it with the
    GIL held, so every other Python thread of the server would wait for a whole pass. The library
    has a C interface (``torch/csrc/inductor/aoti_runtime/interface.h``), and ``ctypes`` releases
    the GIL while a C function runs. So the library is called directly. This takes no compiler and
    no headers, and keeps libtorch out of layertap's own extension.

Note [Shared weights]
    A package has no copy of the weights. Its constants are set to the tensors of the model, which
    the library uses where they are. Only constants that are not tensors of the model are kept with
    the package, such as a table that ``forward`` makes. Tensors of up to eight elements are part of
    the code, so a package is for these weights only.

Note [Nothing is checked inside]
    The code of a package reads its inputs with the sizes and strides for which it was compiled and
    checks neither; other ones would give wrong values, or end the process. So sizes are checked
    here, before each run, and inputs are made contiguous.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["InputShape", "LoadedPackage", "Package", "PackageError"]

_RUNNERS = 16
"""Maximum number of passes that run a package at the same time; further ones wait.

15 further runners of resnet18 took less than 0.2 MiB.
"""


_ALIGNMENT = 64
"""Constants are padded to a multiple of so many bytes, which their size in a package includes."""


class PackageError(Exception):
    """A package can't be loaded, or its run failed; the message says why, as a clause."""


@dataclass(frozen=True)
class InputShape:
    """What a package takes as one input.

    Attributes:
        dtype: The element type, such as ``"float32"``.
        sizes: The size of each dimension, with the batch dimension first; a name if the size is
            free. Dimensions of one name must have one size.
        least: The smallest size of each dimension.
    """

    dtype: str
    sizes: tuple[int | str, ...]
    least: tuple[int, ...]


@dataclass(frozen=True)
class Package:
    """A compiled program.

    Attributes:
        library: The bytes of the shared library.
        inputs: Its inputs, in order.
        outputs: The number of its outputs.
        shared: The constants that are tensors of the model: their names in the library, and the
            tensors' names in the model.
        own: The other constants, by their name in the library.
    """

    library: bytes
    inputs: tuple[InputShape, ...]
    outputs: int
    shared: Mapping[str, str]
    own: Mapping[str, torch.Tensor]


class _Constant(ctypes.Structure):
    """``AOTInductorConstantMapEntry``."""

    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


class _Library:
    """A shared library, and the functions of its C interface.

    Libraries are never unloaded: the dynamic loader can't unload them, as they have symbols that
    are unique in the process.
    """

    def __init__(self, library: bytes) -> None:
        # The loader recognises libraries by their path, so no two of them may have the same one.
        file = Path(tempfile.gettempdir()) / f"layertap-{uuid.uuid4().hex}.so"
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o700)
        try:
            with os.fdopen(descriptor, "wb") as written:
                written.write(library)
            self._functions = ctypes.CDLL(str(file))
        except OSError as error:
            raise PackageError(f"its library can't be loaded ({error})") from error
        finally:
            file.unlink()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function without the GIL; raise PackageError with its own message if it fails."""
        function = getattr(self._functions, f"AOTInductor{name}", None)
        if function is None:
            raise PackageError(f"its library lacks the function AOTInductor{name}")
        if function(*arguments):
            message = ctypes.c_char_p()
            self._functions.AOTInductorGetLastError(ctypes.byref(message))
            words = (message.value or b"").decode(errors="replace").strip()
            raise PackageError(words.splitlines()[0] if words else f"{name} failed")

    def text(self, name: str, *arguments: Any) -> str:
        """Return a text that a function gives."""
        text = ctypes.c_char_p()
        self.call(name, *arguments, ctypes.byref(text))
        return (text.value or b"").decode()

    def number(self, name: str, *arguments: Any) -> int:
        """Return a number that a function gives."""
        number = ctypes.c_size_t()
        self.call(name, *arguments, ctypes.byref(number))
        return number.value


class LoadedPackage:
    """A package in this process, ready to run. Safe between threads.

    Args:
        library: The bytes of its library.

    Raises:
        PackageError: It can't be loaded.
    """

    def __init__(self, library: bytes) -> None:
        self._library = _Library(library)
        self._container = ctypes.c_void_p()
        self._constants: list[ctypes.c_void_p] = []
        self._inputs: tuple[InputShape, ...] = ()
        self._outputs = 0
        runners = min(_RUNNERS, os.cpu_count() or 1)
        self._library.call(
            "ModelContainerCreateWithDevice",
            ctypes.byref(self._container), ctypes.c_size_t(runners), b"cpu", None,
        )  # fmt: skip

    def constants(self) -> dict[str, str]:
        """Return the constants: by their name here, that of the tensor in the exported program."""
        count = self._library.number("ModelContainerGetNumConstants", self._container)
        return {
            self._library.text("ModelContainerGetConstantName", *at): self._library.text(
                "ModelContainerGetConstantOriginalFQN", *at
            )
            for at in ((self._container, ctypes.c_size_t(index)) for index in range(count))
        }

    def bind(
        self, constants: Mapping[str, torch.Tensor], inputs: Sequence[InputShape], outputs: int
    ) -> None:
        """Set every constant, once, before the first run.

        Args:
            constants: A tensor for each name in ``constants()``. It is used where it is, so it must
                not change.
            inputs: What the package takes.
            outputs: The number of its outputs.

        Raises:
            PackageError: If tensors are missing, or don't have the size that the package expects.
        """
        names = list(self.constants())
        missing = [name for name in names if name not in constants]
        if missing:
            raise PackageError(f"it has no tensor for the constant {missing[0]!r}")
        for index, name in enumerate(names):
            at = (self._container, ctypes.c_size_t(index))
            expected = self._library.number("ModelContainerGetConstantDataSize", *at)
            tensor = constants[name]
            if not tensor.nbytes <= expected < tensor.nbytes + _ALIGNMENT:
                raise PackageError(f"the constant {name!r} has another size than the model's")
        self._constants = _handles([constants[name] for name in names])
        entries = (_Constant * len(names))(
            *(
                _Constant(name.encode(), handle.value)
                for name, handle in zip(names, self._constants, strict=True)
            )
        )
        self._library.call(
            "ModelContainerUpdateUserManagedConstantBufferPairs",
            self._container, entries, ctypes.c_size_t(len(names)), ctypes.c_bool(False),
            ctypes.c_bool(True),
        )  # fmt: skip
        self._inputs, self._outputs = tuple(inputs), outputs

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run it on a batch without the GIL, and return its outputs.

        Args:
            tensors: The inputs, in order.

        Raises:
            PackageError: If an input has a size for which the package was not compiled, or the run
                fails.
        """
        given = [tensor.contiguous() for tensor in tensors]
        _check(given, self._inputs)
        taken = (ctypes.c_void_p * len(given))(*(handle.value for handle in _handles(given)))
        made = (ctypes.c_void_p * self._outputs)()
        # It takes over the handles of the inputs, whether it succeeds or not.
        self._library.call(
            "ModelContainerRun",
            self._container, taken, ctypes.c_size_t(len(given)), made,
            ctypes.c_size_t(self._outputs), None, None,
        )  # fmt: skip
        return _tensors(made)

    def __del__(self) -> None:
        """Delete the container, then the handles of the constants that it used."""
        with suppress(Exception):  # As Python ends, anything may be gone already.
            if self._container:
                self._library.call("ModelContainerDelete", self._container)
                _tensors(handle.value for handle in self._constants)


def _check(tensors: Sequence[torch.Tensor], inputs: Sequence[InputShape]) -> None:
    """Raise PackageError if inputs have other types or sizes than the package was compiled for."""
    if len(tensors) != len(inputs):
        raise PackageError(f"got {len(tensors)} inputs, expected {len(inputs)}")
    named: dict[str, int] = {}
    for number, (tensor, expected) in enumerate(zip(tensors, inputs, strict=True)):
        got = tuple(tensor.shape)
        fits = len(got) == len(expected.sizes) and str(tensor.dtype) == f"torch.{expected.dtype}"
        for size, wanted, least in zip(got, expected.sizes, expected.least, strict=False):
            same = named.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            fits = fits and size == same and size >= least
        if not fits:
            sizes = ", ".join(map(str, expected.sizes))
            raise PackageError(
                f"input {number} is {tensor.dtype} {list(got)}, and its program was compiled for "
                f"torch.{expected.dtype} [{sizes}]"
            )


# The functions below convert between tensors and handles of the C interface (AtenTensorHandle).

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _handles(tensors: Sequence[torch.Tensor]) -> list[ctypes.c_void_p]:
    """Return a new handle of each tensor, which the caller must pass on or delete."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    return [ctypes.c_void_p(_pointer(capsule, None)) for capsule in capsules]


def _tensors(handles: Any) -> list[torch.Tensor]:
    """Return the tensors of handles, and delete the handles."""
    capsules = [_new_capsule(handle, None, None) for handle in handles]
    tensors: list[torch.Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
    return tensors
