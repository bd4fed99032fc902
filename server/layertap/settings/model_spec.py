"""The user's specification of a model: a source, its weights and a name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Annotated, Any

from layertap.errors import ConfigError
from layertap.settings import value_kinds as kinds
from layertap.settings.declared_input import INPUT_DTYPES, INPUTS, DeclaredInput
from layertap.settings.definition import NO_FLAG, Setting
from layertap.settings.image_settings import NOTHING_SET, ImageSettings

__all__ = ["PRECISIONS", "ModelSpec", "SourceKind"]

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_TORCHSCRIPT_SUFFIXES = frozenset({".pt", ".pth", ".ts", ".torchscript"})


class SourceKind(StrEnum):
    """The source of a module.

    The code of each kind is in ``models/<kind>_source.py``, that of ``HF_CONFIG`` in
    ``models/hf_source.py``.
    """

    TORCHVISION = "torchvision"
    TORCHSCRIPT = "torchscript"
    FACTORY = "factory"
    TIMM = "timm"
    HF = "hf"
    HF_CONFIG = "hf-config"

    @property
    def is_hugging_face(self) -> bool:
        """Whether transformers builds the model."""
        return self in {SourceKind.HF, SourceKind.HF_CONFIG}


PRECISIONS = ("float32", "float16", "bfloat16")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")
"""The implementations of attention in transformers that run no downloaded code."""
_ANY_TEXT = kinds.ValueKind(str, "a text", "NAME")
_PREFIXES = frozenset(kind.value for kind in SourceKind)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to load: its source, weights, input and name.

    Raises:
        ConfigError: If a field is malformed; the message names it.
    """

    source: Annotated[
        str,
        Setting(
            "A torchvision model (resnet18), a timm model (timm:NAME), a Hugging Face model "
            "(hf:FOLDER or hf:ORG/NAME; hf-config:FOLDER for random weights), a TorchScript file "
            "(net.pt or torchscript:net) or a factory (package.module:function).",
            kinds.some_text(),
            flag=NO_FLAG,
        ),
    ]
    name: Annotated[
        str,
        Setting(
            "What requests call the model: letters, digits, '_', '.' and '-'.",
            _ANY_TEXT,
            flag=NO_FLAG,
            default="derived from the source",
        ),
    ] = ""
    weights: Annotated[
        str,
        Setting(
            "DEFAULT, the name of torchvision weights such as IMAGENET1K_V1, a checkpoint (a .pth, "
            ".pt, .bin, .ckpt or .safetensors file, an index of shards, or a folder with one of "
            "these), or random.",
            kinds.some_text(metavar="W"),
        ),
    ] = "DEFAULT"
    seed: Annotated[int, Setting("Seeds the values of random weights.", kinds.whole(0))] = 0
    item_shape: Annotated[
        tuple[int, ...] | None,
        Setting(
            "Sizes of one input item without the batch.",
            kinds.SIZES,
            default="the model's own",
        ),
    ] = None
    precision: Annotated[
        str,
        Setting(
            "The floating-point type to compute in.",
            kinds.choice(*PRECISIONS),
            default="the weights' own",
        ),
    ] = ""
    channels_last: Annotated[
        bool,
        Setting(
            "Lay out the weights of convolutions with channels last, which is faster on GPUs with "
            "tensor cores and on some CPUs; shapes stay the same.",
            kinds.TRUTH,
        ),
    ] = False
    input_dtype: Annotated[
        str,
        Setting(
            "The element type of the input, such as int64; for factories and TorchScript files.",
            kinds.choice(*INPUT_DTYPES),
            default="found by trying",
        ),
    ] = ""
    free_dims: Annotated[
        tuple[int, ...] | None,
        Setting(
            "Dimensions of the input that may have another size, as indices into the item shape: 0 "
            "for token ids of any length, 1,2 for images of any size; for factories and "
            "TorchScript files.",
            kinds.DIMENSIONS,
            default="found by trying",
        ),
    ] = None
    inputs: Annotated[
        tuple[DeclaredInput, ...],
        Setting(
            "The inputs of a model that takes several, or whose input can't be found by trying; "
            "for factories and TorchScript files. docs/inputs.md describes the form.",
            INPUTS,
            default="read from the model's forward and found by trying",
        ),
    ] = ()
    images: ImageSettings = NOTHING_SET
    weights_key: Annotated[
        str,
        Setting(
            "Which state dict of a checkpoint to load: the keys that lead to it, then the prefix "
            "of its tensors' names, joined by dots, such as teacher.backbone.",
            kinds.ValueKind(str, "a text", "KEY"),
            default="the one with the model's names",
        ),
    ] = ""
    architecture: Annotated[
        str,
        Setting(
            "The class of transformers to build, such as BertModel, or AutoModel for the model "
            "without the head of its task; for Hugging Face models.",
            kinds.some_text(metavar="CLASS"),
            default="the one that config.json names",
        ),
    ] = ""
    attn_implementation: Annotated[
        str,
        Setting(
            "How a Hugging Face model computes attention; use eager to get attention weights.",
            kinds.choice(*ATTENTION),
            default="chosen by transformers",
        ),
    ] = ""
    tokenizer: Annotated[
        str,
        Setting(
            "A tokenizer.json, or a folder with one, by which the server turns texts into the "
            "token ids that the model's first input takes.",
            kinds.FILE_NAME,
            default="the one in a Hugging Face folder",
        ),
    ] = ""
    trust_remote_code: Annotated[
        bool,
        Setting(
            "Run Python code that comes with a Hugging Face model. Such code can do everything "
            "that the server can.",
            kinds.TRUTH,
            flag=NO_FLAG,
        ),
    ] = False

    def __post_init__(self) -> None:
        if not self.target:
            raise ConfigError(
                f"model source: got {self.source!r}, expected a torchvision model such as "
                "'resnet18', a TorchScript file such as 'net.pt' or a factory "
                "'package.module:function'"
            )
        if not self.weights:
            raise ConfigError(
                f"weights of {self.source}: got an empty text, expected 'DEFAULT', a weights name, "
                "a file or 'random'"
            )
        if self.weights_key and self.weights in ("DEFAULT", "random"):
            raise ConfigError(
                f"weights_key of {self.source}: got {self.weights_key!r} with weights "
                f"{self.weights!r}, expected the path of a checkpoint as weights"
            )
        if not self.name:
            object.__setattr__(self, "name", _derived_name(self.kind, self.target))
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"model name: got {self.name!r}, expected letters, digits, '_', '.' or '-'"
            )
        _check_item_shape(self.name, self.item_shape)
        if self.precision not in ("", *PRECISIONS):
            raise ConfigError(
                f"precision of {self.name}: got {self.precision!r}, expected "
                f"{', '.join(PRECISIONS)} or nothing"
            )
        self._check_declared_input()
        self._check_hugging_face()

    @classmethod
    def parse(cls, text: str, **options: Any) -> ModelSpec:
        """Parse ``[NAME=]SOURCE``, as in ``"resnet18"`` or ``"mine=nets/mine.pt"``.

        Args:
            text: The text.
            options: The other fields, by name.

        Raises:
            ConfigError: If the text, or a name in it, is malformed.
        """
        name, equals, source = text.strip().partition("=")
        if not equals or "/" in name or ":" in name:
            # An equals sign after a slash or colon is part of a path.
            return cls(text.strip(), **options)
        if not name:
            raise ConfigError(f"model name: got nothing before '=' in {text!r}, expected a name")
        return cls(source, name=name, **options)

    def _check_declared_input(self) -> None:
        if self.input_dtype not in ("", *INPUT_DTYPES):
            raise ConfigError(
                f"input dtype of {self.name}: got {self.input_dtype!r}, expected one of "
                f"{', '.join(INPUT_DTYPES)}, or nothing to find it by trying"
            )
        dims = self.free_dims
        if dims is not None and (list(dims) != sorted(set(dims)) or min(dims, default=0) < 0):
            raise ConfigError(
                f"free dimensions of {self.name}: got {list(dims)}, expected ascending indices "
                "into the item shape, such as 1,2 for the height and width of images"
            )
        one = bool(self.input_dtype) or dims is not None
        if (one or self.inputs) and self.kind not in (SourceKind.FACTORY, SourceKind.TORCHSCRIPT):
            raise ConfigError(
                f"input of {self.name}: inputs, input_dtype and free_dims can be declared for "
                f"factories and TorchScript files; the input of a {self.kind} model is known"
            )
        if self.inputs and (one or self.item_shape is not None):
            raise ConfigError(
                f"input of {self.name}: got inputs and also item_shape, input_dtype or free_dims, "
                f"expected only inputs, which includes the others"
            )
        if self.inputs and self.inputs[0].optional:
            raise ConfigError(
                f"inputs of {self.name}: got the first one, {self.inputs[0].name!r}, as optional; "
                f"expected a required one first"
            )

    def _check_hugging_face(self) -> None:
        if self.attn_implementation not in ("", *ATTENTION):
            raise ConfigError(
                f"attn_implementation of {self.name}: got {self.attn_implementation!r}, expected "
                f"{', '.join(ATTENTION)} or nothing"
            )
        given = {
            "architecture": self.architecture,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
        wrong = [key for key, value in given.items() if value]
        if wrong and not self.kind.is_hugging_face:
            raise ConfigError(
                f"{wrong[0]} of {self.name}: got {given[wrong[0]]!r} for a {self.kind} model, "
                f"expected it for Hugging Face models (hf: and hf-config:) only"
            )

    @property
    def kind(self) -> SourceKind:
        """Where the module comes from, according to the source's prefix or form."""
        return _split(self.source)[0]

    @property
    def target(self) -> str:
        """The source without its prefix: a builder, a path or ``package.module:function``."""
        return _split(self.source)[1]


def _split(source: str) -> tuple[SourceKind, str]:
    prefix, colon, rest = source.partition(":")
    if colon and prefix in _PREFIXES:
        return SourceKind(prefix), rest
    if PurePath(source).suffix in _TORCHSCRIPT_SUFFIXES:
        return SourceKind.TORCHSCRIPT, source
    if colon:
        return SourceKind.FACTORY, source
    if "/" in source or os.sep in source:
        return SourceKind.TORCHSCRIPT, source
    return SourceKind.TORCHVISION, source


def _derived_name(kind: SourceKind, target: str) -> str:
    if kind is SourceKind.TORCHSCRIPT:
        target = PurePath(target).stem
    elif kind is SourceKind.FACTORY:
        target = target.rpartition(":")[2]
    elif kind.is_hugging_face:
        # The name of the folder, or of the model without its owner and revision.
        target = PurePath(target.partition("@")[0]).name
    return re.sub(r"[^A-Za-z0-9_.-]", "_", target)


def _check_item_shape(name: str, item_shape: tuple[int, ...] | None) -> None:
    if item_shape is not None and (not item_shape or min(item_shape) < 1):
        raise ConfigError(
            f"item shape of {name}: got {list(item_shape)}, expected positive sizes without the "
            "batch, such as 3,224,224"
        )
