"""Catalogues on disk, so that a restart need not measure a model again.

Note [When a kept catalogue is used]
    Measuring a model and testing its claims takes dozens of passes. All of what they show follows
    from the model, the machine and the versions of torch and layertap. So the catalogue is kept
    with digests of these (``facts_of``), and used only if every one of them is equal:

    - the weights, the values that the model keeps in Python, and the code that it can reach;
    - its inputs, and the samples that it is measured with;
    - layertap's own source, and the versions of Python, torch and torchvision;
    - the device, the processor, the threads of a pass and whatever else decides which kernels run.

    Then one pass must agree as well. With the catalogue is kept in which order modules ran on two
    items, and a sample of every module's output; the pass is compared with that, and must leave no
    state behind. So if the code has changed in a way that no digest shows, such as a file that the
    model's code reads, the pass shows it where it changes any value.

    Whatever can't be compared is measured at each start: a model whose passes write state or draw
    random numbers, and one with parts that have no digest (see ``code_identity``).

Note [The file]
    The first line is the digest of the rest, which is JSON. It is written under another name, then
    renamed, so a reader sees a whole file or none, and of several writers the last one stays. A
    file that is damaged or of another format is never used. Reading one runs no code of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from layertap.errors import ConfigError
from layertap.extraction.catalogue import Catalogue, LayerEntry
from layertap.extraction.chance import Generators
from layertap.extraction.code_identity import UnknownCodeError, code_identity
from layertap.extraction.containers import flatten, plain, unsendable
from layertap.extraction.kinds.registry import KINDS
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import KeptState, PassRules, PassScope
from layertap.extraction.plan_cache import PlanCache, fingerprint, remove
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.processor import processor
from layertap.extraction.records import from_record, to_record
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.survey import LooksSurvey
from layertap.extraction.symbolic import GraphNames
from layertap.extraction.taps import observe
from layertap.extraction.verify import compiled_tolerance, difference
from layertap.models import BatchKey, LoadedModel
from layertap.models.tensor_content import digest_of_elements
from layertap.selection import Capture

__all__ = ["CatalogueFile", "facts_of"]

_log = logging.getLogger(__name__)

FORMAT = 2
ITEMS = 2
"""Items of the batch whose pass is compared."""

MAX_SAMPLED = 128
"""Elements of each value that are compared."""

MAX_BYTES = 256 << 20
"""A larger file is not read."""

_ENVIRONMENT = (
    "ATEN_", "CUBLAS_", "CUDA_", "CUDNN_", "DNNL_", "GOMP_", "KMP_", "LAYERTAP_", "MKL_", "NVIDIA_",
    "OMP_", "ONEDNN_", "OPENBLAS_", "PYTORCH_", "TORCH_", "TRANSFORMERS_",
)  # fmt: skip
"""Beginnings of the names of environment variables that choose kernels or code."""


class _NotKeptError(Exception):
    """A model's catalogue can't be kept; the message says why, as a clause."""


@dataclass(frozen=True)
class _Value:
    """One output of a module in the pass that is compared.

    Attributes:
        path: The module.
        call: Which call of it.
        member: Where it is in what the module returned.
        dtype: Its dtype.
        shape: Its shape.
        step: The distance between the sampled elements.
        elements: Their bytes in base64.
    """

    path: str
    call: int
    member: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    step: int
    elements: str


@dataclass(frozen=True)
class _Witness:
    """What one pass showed.

    Attributes:
        calls: The paths of the modules in the order in which their calls began.
        values: Their outputs, in the order in which the calls ended.
    """

    calls: tuple[str, ...]
    values: tuple[_Value, ...]


@dataclass(frozen=True)
class _Graph:
    """The names of a symbolic graph; see ``GraphNames``."""

    train: str
    targets: Mapping[str, str]


@dataclass(frozen=True)
class _Kept:
    """A catalogue without what is known before: its key, its scope and the model's towers."""

    entries: tuple[LayerEntry, ...]
    graph: _Graph | None
    mutates_input: bool
    non_finite: str
    notes: tuple[str, ...]
    looks: LooksSurvey
    varying: frozenset[str]
    towers: tuple[tuple[CapturePoint, ...], ...]
    rules: PassRules
    witnesses: tuple[_Witness, ...]


class CatalogueFile:
    """The file of one model's catalogue, which may not exist yet. For a compute thread.

    Args:
        cache: The folder.
        model: The model. No pass has run since it was loaded, or the loaded state was restored.
        scope: Its scope, in which nothing was measured yet.
    """

    def __init__(self, cache: PlanCache, model: LoadedModel, scope: PassScope) -> None:
        self._cache = cache
        self._model = model
        self._scope = scope
        self.fingerprint = fingerprint(model)
        """Of the model; see ``plan_cache``."""
        self._why_not = ""
        self._facts: dict[str, str] = {}
        try:
            self._facts = facts_of(model, self.fingerprint)
        except _NotKeptError as error:
            self._why_not = str(error)
        names = (model.name, model.source, str(model.device), self.fingerprint)
        name = hashlib.blake2b(repr(names).encode(), digest_size=16).hexdigest()
        self._path = cache.catalogue(name)

    def read(self) -> Catalogue | None:
        """Return the kept catalogue and set the rules of the scope; None to measure the model.

        The log says why a file was not used.
        """
        if self._why_not:
            _log.info("model %s is measured at each start: %s", self._model.name, self._why_not)
            return None
        try:
            kept = self._read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"can't be read ({error.strerror})")
            return None
        except _NotKeptError as error:
            self._tell(str(error))
            return None
        except Exception as error:  # noqa: BLE001 - reading damaged JSON may raise anything
            self._tell(f"is damaged ({type(error).__name__})")
            remove(self._path)
            return None
        _log.info("model %s: its catalogue is the one of an earlier start", self._model.name)
        self._cache.used(self._path)
        return kept

    @property
    def facts(self) -> str:
        """A digest of everything that the catalogue depends on."""
        return _digest(repr(sorted(self._facts.items())))

    def store(self, catalogue: Catalogue) -> bool:
        """Keep a catalogue that was just measured; the log says why it can't be kept.

        Returns:
            Whether it is kept.
        """
        if self._why_not:
            return False
        try:
            data = _packed(self._facts, self._kept(catalogue))
            self._cache.replace(self._path, memoryview(data))
        except _NotKeptError as error:
            _log.info("model %s is measured at each start: %s", self._model.name, error)
        except (OSError, ConfigError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            _log.warning("model %s: its catalogue is not kept: %s", self._model.name, reason)
        except Exception as error:  # noqa: BLE001 - the model was measured: it can be served
            _log.warning("model %s: its catalogue is not kept", self._model.name, exc_info=error)
        else:
            self._cache.trim()
            return True
        return False

    def _tell(self, what: str) -> None:
        _log.warning("model %s is measured again: its kept catalogue %s", self._model.name, what)

    def _read(self) -> Catalogue:
        facts, record = _unpacked(self._path)
        changed = [name for name, fact in self._facts.items() if facts.get(name) != fact]
        if changed or facts.keys() != self._facts.keys():
            raise _NotKeptError(f"is for others of these: {', '.join(changed) or 'facts'}")
        kept = from_record(_Kept, record)
        for key, witness in zip(self._keys(), kept.witnesses, strict=True):
            fault = _fault(self._witness(key), witness)
            if fault:
                raise _NotKeptError(f"does not fit it: {fault}")
        self._scope.settle(kept.rules, ())
        signature = self._model.signature
        return Catalogue(
            {entry.name: entry for entry in kept.entries},
            GraphNames([kept.graph.train], kept.graph.targets) if kept.graph else None,
            key=signature.key,
            mutates_input=kept.mutates_input,
            scope=self._scope,
            non_finite=kept.non_finite,
            notes=kept.notes,
            looks=kept.looks,
            towers={
                tower: frozenset(points)
                for tower, points in zip(signature.towers, kept.towers, strict=True)
            },
            varying=kept.varying,
        )

    def _kept(self, catalogue: Catalogue) -> _Kept:
        rules = self._scope.rules
        if rules.state is not KeptState.NONE:
            raise _NotKeptError("its passes write state")
        if rules.own_threads:
            raise _NotKeptError("its modules run in its own threads")
        graph = catalogue.graph
        return _Kept(
            tuple(catalogue),
            _Graph(graph.train, graph.targets) if graph else None,
            catalogue.mutates_input,
            catalogue.non_finite,
            catalogue.notes,
            catalogue.looks,
            catalogue.varying,
            tuple(tuple(catalogue.towers[t]) for t in self._model.signature.towers),
            rules,
            tuple(self._witness(key) for key in self._keys()),
        )

    def _keys(self) -> list[BatchKey]:
        signature = self._model.signature
        return list(dict.fromkeys((signature.key, signature.whole_key)))

    def _witness(self, key: BatchKey) -> _Witness:
        """Run a pass; raise _NotKeptError if it can't be compared with another one."""
        chance = Generators(self._model.device)
        try:
            with self._scope:
                seen = _watched(self._model, key)
                written = self._scope.snapshot.deep_changes()
        except Exception as error:
            raise _NotKeptError(f"its pass fails ({own_words(error)})") from error
        if written:
            raise _NotKeptError(f"its pass writes {written[0].path!r}")
        if chance.moved():
            raise _NotKeptError("its pass draws random numbers")
        return seen


def facts_of(model: LoadedModel, weights: str) -> dict[str, str]:
    """Return everything that a model's catalogue depends on, by name.

    Args:
        model: The model; it is not run.
        weights: Its fingerprint.

    Raises:
        _NotKeptError: Something of it can't be compared.
    """
    try:
        code = code_identity(model.module, model.example, model.arguments.adapter)
    except UnknownCodeError as error:
        raise _NotKeptError(str(error)) from error
    arguments = (model.arguments.parameters, model.takes_list, model.differentiates)
    return {
        "format": str(FORMAT),
        "layertap": _own_source(),
        "extractors": repr([(kind.name, type(kind).__module__) for kind in KINDS.values()]),
        "Python": sys.version,
        "torch": f"{torch.__version__} {torch.version.git_version} {torch.version.cuda}",
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "model": repr((model.name, model.source, model.weights)),
        "inputs": repr((model.signature, arguments)),
        "samples": _samples(model),
        "weights": weights,
        "code": code,
        "device": _device(model.device),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "numerics": repr(_numerics(model.device)),
        "environment": _digest(repr(sorted(_environment()))),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


@cache
def _own_source() -> str:
    """Return a digest of layertap's own source: another version measures other things."""
    digest = hashlib.blake2b(digest_size=16)
    root = Path(__file__).resolve().parent.parent
    for file in sorted(map(str, root.rglob("*.py"))):
        digest.update(f"{file.removeprefix(str(root))}\n".encode())
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _samples(model: LoadedModel) -> str:
    batch = ordinary_batch(model, ITEMS)
    return _digest(repr([(name, digest_of_elements(batch[name])) for name in batch]))


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return repr((device, torch.cuda.get_device_name(device), torch.backends.cudnn.version()))


def _numerics(device: torch.device) -> tuple[Any, ...]:
    mkldnn: Any = torch.backends.mkldnn
    found: tuple[Any, ...] = (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        # "none", as long as nobody has set one, means "ieee".
        *(
            each.fp32_precision.replace("none", "ieee")
            for each in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        ),
        torch.is_autocast_enabled("cpu"),
    )
    if device.type != "cuda":
        return found
    return (
        *found,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
    )


def _environment() -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in os.environ.items() if name.startswith(_ENVIRONMENT))


def _packed(facts: Mapping[str, str], kept: _Kept) -> bytes:
    body = json.dumps({"facts": facts, "kept": to_record(kept)}, separators=(",", ":")).encode()
    return f"{_checksum(body)}\n".encode() + body


def _unpacked(path: Path) -> tuple[dict[str, str], Any]:
    """Return the facts and the record of a file; raise ValueError if it is damaged."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    checksum, _, body = data.partition(b"\n")
    if len(data) > MAX_BYTES or checksum.decode("ascii") != _checksum(body):
        raise ValueError("its checksum is wrong")
    whole = json.loads(body)
    return whole["facts"], whole["kept"]


def _checksum(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=32).hexdigest()


def _watched(model: LoadedModel, key: BatchKey) -> _Witness:
    """Run a model on a batch of ordinary numbers, and return what to compare another pass with."""
    begun: list[str] = []
    values: list[_Value] = []
    ended: dict[str, int] = {}

    def see(path: str, side: Capture, value: Any) -> None:
        if side is Capture.INPUT:
            begun.append(path)
            return
        call = ended[path] = ended.get(path, -1) + 1
        for way, tensor in flatten(value):
            point = CapturePoint(PointKind.MODULE, path, side, call, way)
            if not unsendable(tensor):
                values.append(_sampled(point, plain(tensor)))

    with observe(model.module, see):
        model.forward(ordinary_batch(model, ITEMS, key))
    return _Witness(tuple(begun), tuple(values))


def _sampled(point: CapturePoint, value: torch.Tensor) -> _Value:
    step = max(1, value.numel() // MAX_SAMPLED) | 1  # Odd, as most sizes are even.
    elements = _text(value.reshape(-1)[::step])
    shape = tuple(value.shape)
    return _Value(point.path, point.call, point.member, value.dtype, shape, step, elements)


def _text(tensor: torch.Tensor) -> str:
    raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return base64.b64encode(raw.numpy().tobytes()).decode("ascii")


def _tensor(text: str, dtype: torch.dtype) -> torch.Tensor:
    data = bytearray(base64.b64decode(text))
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _fault(now: _Witness, then: _Witness) -> str:
    """Return how two passes differ, as a clause; empty if they agree."""
    if now.calls != then.calls:
        return "its modules run in another order"
    if len(now.values) != len(then.values):
        return "its modules return other values"
    for mine, kept in zip(now.values, then.values, strict=True):
        if mine != kept and (
            replace(mine, elements="") != replace(kept, elements="") or not _is_near(mine, kept)
        ):
            return f"{kept.path or 'the model'!r} returns another value"
    return ""


def _is_near(mine: _Value, kept: _Value) -> bool:
    true = _tensor(kept.elements, kept.dtype)
    return difference(_tensor(mine.elements, mine.dtype), true) <= compiled_tolerance(true)
