"""Reads the inputs of a request, raw, typed or in shared memory: tensors, images, texts, audio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layertap.engine import AudioFiles, ImageFiles, Inputs, Limits, TextBatch
from layertap.errors import InvalidInputError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.infer.parameters import check_known
from layertap.services.infer.shared_memory_rpcs import PARAMETERS, CallerMemory
from layertap.services.infer.texts import TEXT_PARAMETERS, decoded_texts, text_options
from layertap.wire.codec import MAX_MESSAGE_BYTES, MAX_RANK
from layertap.wire.dtypes import DType, by_datatype
from layertap.wire.infer_messages import MAX_INPUTS
from layertap.wire.tensors import TensorView

__all__ = [
    "AUDIO_NAME",
    "BYTES",
    "IMAGES_NAME",
    "TENSOR_NAME",
    "TEXTS_NAME",
    "TakenInputs",
    "infer_inputs",
]

TENSOR_NAME = "input"
"""A name that requests may use for the only input that a model needs."""

IMAGES_NAME = "images"
"""A name that requests may use for images, if only one input takes images."""

AUDIO_NAME = "audio"
"""A name that requests may use for recordings, if only one input takes them."""

TEXTS_NAME = "texts"
"""A name that requests may use for texts; they are for the first input that takes texts."""

BYTES = "BYTES"

_PREFIX = 4
"""Bytes of the length in front of each element of raw BYTES contents."""

InputTensor = pb.ModelInferRequest.InferInputTensor

# The field of InferTensorContents for each datatype that has a typed field.
_TYPED = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


@dataclass(frozen=True, slots=True)
class TakenInputs:
    """The names of a model's inputs.

    Attributes:
        names: All of them.
        images: Those that take images.
        texts: Those that take texts.
        audio: Those that take recordings.
        frames: The number of images in one item: more than one if items are videos.
    """

    names: Sequence[str] = ()
    images: Sequence[str] = ()
    texts: Sequence[str] = ()
    audio: Sequence[str] = ()
    frames: int = 1


NO_NAMES = TakenInputs()
"""For requests that use the common names only."""


def infer_inputs(
    request: pb.ModelInferRequest,
    raw: Sequence[memoryview],
    memory: CallerMemory,
    limits: Limits,
    *,
    taken: TakenInputs = NO_NAMES,
    admit: Callable[[int], object] = lambda nbytes: None,
) -> Inputs:
    """Return the inputs in a request.

    Args:
        request: Its small fields.
        raw: Its raw contents: one for each input that is neither typed nor in shared memory.
        memory: The caller's shared memory.
        limits: The limits of requests.
        taken: The names of the model's inputs.
        admit: Called before allocating, with the bytes that the inputs need besides the message;
            may raise OverloadedError.

    Raises:
        InvalidInputError: If an input contradicts itself, or there is none.
        NotFoundError, PermissionDeniedError: If it names shared memory that the caller doesn't
            have.
    """
    if not request.inputs:
        raise InvalidInputError("inputs: got none, expected at least one")
    if len(request.inputs) > MAX_INPUTS:
        raise InvalidInputError(f"inputs: got {len(request.inputs)}, expected at most {MAX_INPUTS}")
    contents = _Contents(request, raw, memory, limits, admit)
    tensors: list[TensorView] = []
    images: list[ImageFiles] = []
    texts: list[TextBatch] = []
    audio: list[AudioFiles] = []
    for tensor in request.inputs:
        where = f"input {tensor.name!r}"
        if tensor.datatype != BYTES:
            tensors.append(_tensor(request.model_name, tensor, contents, taken, admit))
            continue
        kind = _kind(request.model_name, tensor, taken)
        known = TEXT_PARAMETERS if kind == TEXTS_NAME else ()
        check_known(tensor.parameters, (*PARAMETERS, *known), where)
        name = tensor.name if tensor.name in taken.names else ""
        most = limits.batch * (taken.frames if kind == IMAGES_NAME else 1)
        elements = _elements(tensor, contents.of(tensor), most, kind, where)
        if kind == TEXTS_NAME:
            options = text_options(request.parameters, tensor.parameters, where)
            # A text takes up to four times its UTF-8.
            admit(4 * sum(map(len, elements)))
            texts.append(TextBatch(decoded_texts(elements, where), options, name))
        elif kind == AUDIO_NAME:
            audio.append(AudioFiles(elements, name))
        else:
            images.append(ImageFiles(elements, name))
    contents.check_all_taken()
    _check_text_parameters(request, texts)
    return Inputs(tuple(tensors), tuple(images), tuple(texts), tuple(audio))


def _check_text_parameters(request: pb.ModelInferRequest, texts: Sequence[TextBatch]) -> None:
    """Raise InvalidInputError for parameters of texts in a request without texts."""
    stray = [name for name in TEXT_PARAMETERS if name in request.parameters]
    if stray and not texts:
        raise InvalidInputError(
            f"request: got parameter {stray[0]!r} without texts, expected it only with an input of "
            f"texts"
        )


def _kind(model: str, tensor: InputTensor, taken: TakenInputs) -> str:
    """Return the common name for what an input of datatype BYTES holds.

    Raises:
        InvalidInputError: No input of that name takes bytes.
    """
    takers = {TEXTS_NAME: taken.texts, IMAGES_NAME: taken.images, AUDIO_NAME: taken.audio}
    for kind, names in takers.items():
        if tensor.name in names:
            return kind
    if tensor.name in taken.names:
        raise InvalidInputError(
            f"input {tensor.name!r}: got datatype {BYTES}, but this input of model {model!r} takes "
            f"neither texts nor images nor audio; send a tensor"
        )
    if tensor.name in takers:
        return tensor.name
    own = [name for names in takers.values() for name in names]
    common = [kind for kind, names in takers.items() if names] or [IMAGES_NAME]
    expected = ", ".join(map(repr, dict.fromkeys((*own, *common))))
    raise InvalidInputError(
        f"unexpected inference input {tensor.name!r} for model {model!r}, expected {expected} for "
        f"datatype {BYTES!r}"
    )


def _tensor(
    model: str,
    tensor: InputTensor,
    contents: _Contents,
    taken: TakenInputs,
    admit: Callable[[int], object],
) -> TensorView:
    where = f"input {tensor.name!r}"
    name = _own_name(model, tensor, taken.names)
    check_known(tensor.parameters, PARAMETERS, where)
    shape = _shape(tensor, where)
    data = contents.of(tensor)
    row = by_datatype(tensor.datatype)
    if data is None:
        data = _typed(tensor, row, math.prod(shape), where, admit)
    return TensorView(name, row, shape, _checked(data, row, shape, where))


def _own_name(model: str, tensor: InputTensor, names: Sequence[str]) -> str:
    """Return the model's name for an input; empty if the request used the common name."""
    if tensor.name in names:
        return tensor.name
    if tensor.name == TENSOR_NAME:
        return ""
    expected = ", ".join(map(repr, dict.fromkeys((*names, TENSOR_NAME))))
    raise InvalidInputError(
        f"unexpected inference input {tensor.name!r} for model {model!r}, expected {expected} for "
        f"datatype {tensor.datatype!r}"
    )


def _shape(tensor: InputTensor, where: str) -> tuple[int, ...]:
    if len(tensor.shape) > MAX_RANK:
        raise InvalidInputError(
            f"{where}: shape: got rank {len(tensor.shape)}, expected at most {MAX_RANK}"
        )
    shape = tuple(tensor.shape)
    sizes = math.prod(size for size in shape if size)
    if any(size < 0 for size in shape) or sizes > MAX_MESSAGE_BYTES:
        raise InvalidInputError(
            f"{where}: shape: got {list(shape)}, a negative size or more than a message holds"
        )
    return shape


class _Contents:
    """Finds the bytes of each input of a request; the arguments are those of ``infer_inputs``."""

    def __init__(
        self,
        request: pb.ModelInferRequest,
        raw: Sequence[memoryview],
        memory: CallerMemory,
        limits: Limits,
        admit: Callable[[int], object],
    ) -> None:
        self._inputs = len(request.inputs)
        self._raw: Iterator[memoryview] = iter(raw)
        self._count = len(raw)
        self._memory = memory
        self._limits = limits
        self._admit = admit

    def of(self, tensor: InputTensor) -> memoryview | None:
        """Return the bytes of the next input; None if they are typed."""
        where = f"input {tensor.name!r}"
        place = self._memory.slice(tensor.parameters, where)
        typed = tensor.HasField("contents")
        if typed and self._count:
            raise InvalidInputError(
                f"contents field must not be specified when using raw_input_contents for {where}"
            )
        if place is not None and (typed or (self._count and self._inputs == 1)):
            raise InvalidInputError(
                f"{where}: got contents and shared memory, expected one of them"
            )
        if place is not None:
            # Before it is read: a region may be far larger than any message.
            if place.byte_size > self._limits.request_bytes:
                raise InvalidInputError(
                    f"{where}: got {place.byte_size} bytes of shared memory, expected at most "
                    f"{self._limits.request_bytes}"
                )
            self._admit(place.byte_size)
            return memoryview(place.read())
        if typed:
            return None
        data = next(self._raw, None)
        if data is None:
            raise InvalidInputError(
                f"{where}: got no data, expected raw_input_contents, contents or shared memory"
            )
        return data

    def check_all_taken(self) -> None:
        """Raise InvalidInputError if there are more raw contents than inputs that need them."""
        left = len(list(self._raw))
        if left:
            taken = self._count - left
            raise InvalidInputError(
                f"raw_input_contents: got {self._count}, expected {taken} for {self._inputs} "
                f"input{'s' * (self._inputs > 1)}"
            )


def _typed(
    tensor: InputTensor, row: DType, count: int, where: str, admit: Callable[[int], object]
) -> memoryview:
    values = _contents(tensor, count, where)
    admit(count * row.itemsize)
    kind = np.dtype(row.numpy)
    array = np.array(values, dtype=np.int64 if kind.kind in "iu" else kind)
    if kind.kind in "iu" and array.size:
        limits = np.iinfo(kind)
        if array.min() < limits.min or array.max() > limits.max:
            raise InvalidInputError(
                f"{where}: contents: got {array.min()} to {array.max()}, expected "
                f"{limits.min} to {limits.max} for {tensor.datatype}"
            )
    return memoryview(array.astype(kind).tobytes())


def _contents(tensor: InputTensor, count: int, where: str) -> Sequence[object]:
    """Return the typed contents after checking their number and type."""
    name = _TYPED.get(tensor.datatype)
    if name is None:
        raise InvalidInputError(
            f"{where}: {tensor.datatype} has no typed contents, expected raw_input_contents"
        )
    stray = [field.name for field, _ in tensor.contents.ListFields() if field.name != name]
    if stray:
        raise InvalidInputError(
            f"{where}: contents: got {', '.join(stray)}, expected {name} for {tensor.datatype}"
        )
    values: Sequence[object] = getattr(tensor.contents, name)
    if len(values) != count:
        raise InvalidInputError(
            f"{where}: {name}: got {len(values)} elements, expected {count} for shape "
            f"{list(tensor.shape)}"
        )
    return values


def _checked(data: memoryview, row: DType, shape: tuple[int, ...], where: str) -> memoryview:
    expected = math.prod(shape) * row.itemsize
    if data.nbytes != expected:
        raise InvalidInputError(
            f"unexpected total byte size {data.nbytes} for {where}, expecting {expected} for shape "
            f"{list(shape)} of {row.datatype}"
        )
    # In numpy and torch, the meaning of any other byte is undefined.
    if row.name == "bool" and expected and np.frombuffer(data, np.uint8).max() > 1:
        raise InvalidInputError(f"{where}: got a byte above 1 in BOOL, expected 0 or 1")
    return data


def _elements(
    tensor: InputTensor, data: memoryview | None, most: int, what: str, where: str
) -> tuple[bytes, ...]:
    """Return the elements of an input of datatype BYTES, one for each item."""
    shape = _shape(tensor, where)
    if len(shape) != 1 or shape[0] < 1:
        raise InvalidInputError(
            f"{where}: shape: got {list(shape)}, expected [N]: N {what}, at least one"
        )
    # Checked before splitting, as each element takes a step.
    if shape[0] > most:
        raise InvalidInputError(f"{where}: got {shape[0]} {what}, expected at most {most}")
    if data is None:
        return tuple(map(bytes, _contents(tensor, shape[0], where)))  # type: ignore[arg-type]
    return _split(data, shape[0], where)


def _split(data: memoryview, count: int, where: str) -> tuple[bytes, ...]:
    """Split byte strings, each of which follows its length (4 bytes, little-endian)."""
    found, at = [], 0
    for index in range(count):
        if data.nbytes - at < _PREFIX:
            raise InvalidInputError(
                f"{where}: got {index} BYTES elements in {data.nbytes} bytes, expected {count}"
            )
        size = int.from_bytes(data[at : at + _PREFIX], "little")
        at += _PREFIX
        if size > data.nbytes - at:
            raise InvalidInputError(
                f"{where}: BYTES element {index}: got a length of {size} with "
                f"{data.nbytes - at} bytes left"
            )
        found.append(bytes(data[at : at + size]))
        at += size
    if at != data.nbytes:
        raise InvalidInputError(
            f"{where}: got {data.nbytes - at} bytes after {count} BYTES elements, expected none"
        )
    return tuple(found)
