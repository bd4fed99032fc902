"""Selections of layers, extractors and reductions, shared by client, server and command line."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any, Self

import numpy as np

from layertap.errors import InvalidInputError
from layertap.float_arrays import as_array, check_floats
from layertap.projection import Projection, SentProjection
from layertap.regrid import NO_REGRID, Regrid, Resize

__all__ = [
    "MAX_STEPS",
    "SENT_DTYPES",
    "SIDES",
    "Capture",
    "Extractor",
    "Glob",
    "IntegrationRule",
    "LayerSelection",
    "MapForm",
    "Method",
    "Reduction",
    "SelectionLike",
    "Sweep",
    "as_extractor",
    "cut_at",
    "is_glob",
    "parse_selections",
]


SENT_DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes that a selection may request for floating-point values."""


class Extractor(StrEnum):
    """A way to capture a layer's value; ``layertap.v1.Extractor`` has the same names.

    The order is the one in which AUTO prefers them. The module of ``layertap.extraction.kinds``
    with an extractor's name explains what it does.

    Attributes:
        letter: The letter that tables show; empty for AUTO.
        automatic: Whether AUTO uses it; else a request must name it.
    """

    letter: str
    automatic: bool

    def __new__(cls, value: str, letter: str = "", automatic: bool = True) -> Self:
        """Make a member from its value, its letter, and whether AUTO uses it."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.letter = letter
        member.automatic = automatic
        return member

    AUTO = "auto"
    TORCHSCRIPT = "torchscript", "T"
    # Python 3.14 and later: PyTorch does not support TorchScript there.
    EXPORT = "export", "E", sys.version_info >= (3, 14)
    HOOK = "hook", "H"
    FX = "fx", "F"
    LAYER_GETTER = "layer_getter", "L"
    CHILDREN = "children", "C"


def as_extractor(name: Extractor | str) -> Extractor:
    """Return an extractor by its name; raise InvalidInputError for an unknown name."""
    try:
        return Extractor(name)
    except ValueError:
        raise InvalidInputError(
            f"extractor: got {name!r}, expected one of {', '.join(Extractor)}"
        ) from None


class Capture(StrEnum):
    """What to capture of a layer; ``layertap.v1.Capture`` has the same names.

    OUTPUT and INPUT are the sides of a layer; the others are gradients with respect to a side.
    """

    OUTPUT = "output"
    INPUT = "input"
    GRADIENT = "gradient"
    INPUT_GRADIENT = "input_gradient"

    @property
    def side(self) -> Capture:
        """The side of the layer: the captured one, or the one that the gradient belongs to."""
        return _SIDE_OF.get(self, self)

    @property
    def is_gradient(self) -> bool:
        """Whether it is a gradient and not a value of the forward pass."""
        return self in _SIDE_OF


_SIDE_OF = {Capture.GRADIENT: Capture.OUTPUT, Capture.INPUT_GRADIENT: Capture.INPUT}

SIDES = (Capture.OUTPUT, Capture.INPUT)
"""The sides of a layer."""


class Method(StrEnum):
    """What is made of a gradient, or of a value; ``layertap.v1.Method`` has the same names.

    The maps are ``[B, H, W]``, one number for each place of the layer's grid, and keep their sign.
    """

    GRADIENT = "gradient"
    """The gradient itself."""
    GRADIENT_X_ACTIVATION = "gradient_x_activation"
    """The gradient times the value that it belongs to."""
    GRAD_CAM = "grad_cam"
    """The channels of the value, each weighted by the mean of its gradient, added up."""
    HIRES_CAM = "hires_cam"
    """The gradient times the value, added up over the channels."""
    LAYER_CAM = "layer_cam"
    """The positive part of the gradient times the value, added up over the channels."""
    GRAD_CAM_PLUS_PLUS = "grad_cam_plus_plus"
    """Grad-CAM with the weights of Grad-CAM++."""
    INTEGRATED_GRADIENTS = "integrated_gradients"
    """The integral of the gradient from a baseline to the value, times the way between them."""
    SMOOTH_GRAD = "smooth_grad"
    """The mean of the gradients at the value with noise added."""
    EIGEN_CAM = "eigen_cam"
    """The value's channels, each place projected on their first singular vector; no gradient."""
    GUIDED_BACKPROPAGATION = "guided_backpropagation"
    """The gradient, of which every ReLU on its way lets only the positive part pass."""

    @property
    def takes_gradient(self) -> bool:
        """Whether it is made of a gradient, so that the request needs an objective."""
        return self is not Method.EIGEN_CAM

    @property
    def companion(self) -> str:
        """The suffix of the tensor ``[B]`` that the reply has beside the result; empty if none."""
        return {
            Method.INTEGRATED_GRADIENTS: "gap",
            Method.GUIDED_BACKPROPAGATION: "relus",
        }.get(self, "")

    @property
    def is_map(self) -> bool:
        """Whether the result is a map ``[B, H, W]`` instead of a value of the layer's shape."""
        return self in (
            Method.GRAD_CAM,
            Method.HIRES_CAM,
            Method.LAYER_CAM,
            Method.GRAD_CAM_PLUS_PLUS,
            Method.EIGEN_CAM,
        )

    @property
    def sweeps(self) -> bool:
        """Whether it takes the gradients at other values than the model's own."""
        return self in (Method.INTEGRATED_GRADIENTS, Method.SMOOTH_GRAD)


class MapForm(StrEnum):
    """The form in which a map is sent; ``layertap.v1.MapForm`` has the same names."""

    GRID = "grid"
    """One number for each place of the layer's grid, ``[B, H, W]``."""
    RESIZED = "resized"
    """The same at the height and width of the model's input: bilinear, ``align_corners=False``."""
    OVERLAY = "overlay"
    """The resized map as colours over the image that the model was given, ``[B, H, W, 3] uint8``.

    The image is gray. Positive numbers are red and negative ones blue, the stronger the nearer they
    are to the largest magnitude of the item's map.
    """


class IntegrationRule(StrEnum):
    """Where integrated gradients are evaluated; ``layertap.v1.IntegrationRule`` has the same."""

    GAUSS_LEGENDRE = "gauss_legendre"
    TRAPEZOID = "trapezoid"
    LEFT = "left"
    MIDDLE = "middle"
    RIGHT = "right"


MAX_STEPS = 1000
"""Maximum number of steps of a sweep."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The options of integrated gradients and SmoothGrad.

    Attributes:
        steps: The number of gradients for each item.
        rule: For integrated gradients: where on the way they are taken.
        baseline: For integrated gradients: each element of the baseline; or the baseline itself, an
            array or tensor of a floating-point dtype and the shape of an item's value, or
            ``[B, ...]`` to have one for each item.
        noise: For SmoothGrad: the standard deviation of the noise, as a share of the difference
            between an item's largest and smallest element.
        seed: For SmoothGrad: seeds the noise, which is the same for each item.

    Raises:
        InvalidInputError: If a number is out of its range.
    """

    steps: int = 50
    rule: IntegrationRule = IntegrationRule.GAUSS_LEGENDRE
    baseline: float | np.ndarray[Any, np.dtype[Any]] = 0.0
    noise: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rule, IntegrationRule):
            rule = _member("rule", self.rule, IntegrationRule)
            object.__setattr__(self, "rule", rule)
        least = 2 if self.rule is IntegrationRule.TRAPEZOID else 1
        if not least <= self.steps <= MAX_STEPS:
            raise InvalidInputError(
                f"sweep: steps: got {self.steps}, expected from {least} to {MAX_STEPS}"
            )
        if not isinstance(self.baseline, Real):
            array = as_array(self.baseline)
            check_floats(array, "sweep: baseline")
            object.__setattr__(self, "baseline", array)
        elif not math.isfinite(self.baseline):
            raise InvalidInputError(f"sweep: baseline: got {self.baseline}, expected a number")
        if not 0 <= self.noise < math.inf:
            raise InvalidInputError(f"sweep: noise: got {self.noise}, expected a number from 0")
        if not 0 <= self.seed < 1 << 32:
            raise InvalidInputError(f"sweep: seed: got {self.seed}, expected from 0 to 2**32 - 1")


class Reduction(StrEnum):
    """What is done to a value before it is sent; ``layertap.v1.Reduction`` has the same names."""

    NONE = "none"
    GLOBAL_AVERAGE_POOL = "global_average_pool"
    FLATTEN = "flatten"
    CLASS_TOKEN = "class_token"
    TOKEN_GRID = "token_grid"
    LAST_TOKEN = "last_token"
    TOKEN_MAX = "token_max"
    TOKENS = "tokens"
    WORDS = "words"

    @property
    def ragged(self) -> bool:
        """Whether items have different numbers of values, so that the result has no batch axis."""
        return self in (Reduction.TOKENS, Reduction.WORDS)


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """A layer to return.

    Attributes:
        layer: A layer's name, or a glob that matches names.
        capture: The side of the layer, or the gradient with respect to a side.
        alias: The name in the reply; if empty, it is ``layer`` (``layer2+layer3`` for a
            concatenation), ``layer:input``, ``layer:gradient`` or ``layer:input_gradient``, or
            with a method ``layer:grad_cam`` or ``layer:input_grad_cam``; whatever the form of a map
            is.
        reduction: What is done to the value before it is sent.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: the dtype in which floating-point
            values are sent; if empty, the model's own dtype.
        method: What is made of the gradient, if ``capture`` is a gradient; or EIGEN_CAM, which is
            made of the value.
        sweep: The options of a method that takes several gradients; no effect for others.
        map_form: The form in which the map of a method is sent.
        concat: Further layers. The values of all of them together are one tensor: their channels
            follow those of ``layer``. Every option is that of each layer.
        regrid: What is done to the layer's grid, before the reduction.
        projection: What the channels are multiplied by, after everything else.

    Raises:
        InvalidInputError: For an unknown capture, reduction, method or form, which may be given as
            members or by name; for a method that needs a gradient where the capture is none, or the
            other way round; for the form of a method that makes no map; for a glob, a map or a
            method with a companion in a concatenation.
    """

    layer: str
    capture: Capture = Capture.OUTPUT
    alias: str = ""
    reduction: Reduction = Reduction.NONE
    dtype: str = ""
    method: Method = Method.GRADIENT
    sweep: Sweep = field(default_factory=Sweep)
    map_form: MapForm = MapForm.GRID
    concat: tuple[str, ...] = ()
    regrid: Regrid = NO_REGRID
    projection: Projection | SentProjection | None = None

    def __post_init__(self) -> None:
        kinds: tuple[tuple[str, type[Capture | Reduction | Method | MapForm]], ...] = (
            ("capture", Capture),
            ("reduction", Reduction),
            ("method", Method),
            ("map_form", MapForm),
        )
        for name, kind in kinds:
            given = getattr(self, name)
            if not isinstance(given, kind):
                object.__setattr__(self, name, _member(name, given, kind))
        wanted = self.method.takes_gradient
        if self.method is not Method.GRADIENT and wanted is not self.capture.is_gradient:
            expected = "GRADIENT or INPUT_GRADIENT" if wanted else "OUTPUT or INPUT"
            raise InvalidInputError(
                f"method: got {self.method.name} for the {self.capture} of layer {self.layer!r}, "
                f"expected the capture {expected}"
            )
        if self.map_form is not MapForm.GRID and not self.method.is_map:
            maps = ", ".join(method.name for method in Method if method.is_map)
            raise InvalidInputError(
                f"map: got {self.map_form.name} for {self.method.name} of layer {self.layer!r}, "
                f"which is no map; maps are {maps}"
            )
        object.__setattr__(self, "concat", tuple(self.concat))
        if self.concat:
            self._check_concat()

    def _check_concat(self) -> None:
        glob = next((name for name in self.layers if is_glob(name)), None)
        if glob is not None:
            raise InvalidInputError(
                f"concat: got the glob {glob!r}, expected the name of each layer, as their order "
                f"is that of the channels"
            )
        if self.method.is_map or self.method.companion:
            raise InvalidInputError(
                f"concat: got {self.method.name} of layers {self.name!r}, expected values or "
                f"gradients"
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer, and those that are concatenated to it."""
        return (self.layer, *self.concat)

    @property
    def name(self) -> str:
        """The names of all layers together, such as ``layer2+layer3``."""
        return "+".join(self.layers)

    @classmethod
    def parse(cls, text: str, load: Callable[[str], Projection] | None = None) -> LayerSelection:
        r"""Read ``LAYER[+LAYER]...[:CAPTURE][:OPTION=VALUE]...[=ALIAS]``.

        Examples are ``avgpool:input=before``, ``layer3:reduce=global_average_pool=pooled``,
        ``layer4:grad_cam:map=resized`` and ``layer2+layer3:around=3=patches``. The options are
        ``map``, ``reduce``, ``dtype``, ``around``, ``resize`` and ``pool`` (see `Regrid`) and
        ``project=@FILE`` (see `Projection`). CAPTURE is a value of `Capture`, or of `Method` for
        what is made of the layer's output or its gradient; if it is left out, ``output``. If the
        layer's name contains a colon, an equals sign, a plus sign or a backslash, put a backslash
        in front of it: ``heads.a\=b``. Everything after the alias's equals sign belongs to the
        alias.

        Args:
            text: The text.
            load: Returns the projection in a file; None if files can't be named.
        """
        layer, sign, rest = cut_at(text, ":=")
        given: dict[str, str] = {}
        while sign == ":":
            option, sign, rest = cut_at(rest, ":=")
            value = option
            if option in _OPTIONS and sign == "=":
                value, sign, rest = cut_at(rest, ":=")
            name = _OPTIONS.get(option, "capture")
            known = dict.fromkeys((*Capture, *Method))
            if name in given or not value or (name == "capture" and value not in known):
                raise InvalidInputError(
                    f"layer: got {text!r}, expected one of {', '.join(known)}, or one of "
                    f"{', '.join(map('{}=VALUE'.format, _OPTIONS))} after a colon, each once; a "
                    f"colon in the layer's own name is written '\\:'"
                )
            given[name] = value
        first, *more = _names(layer)
        if not first or not all(more) or (sign and not rest):
            raise InvalidInputError(
                f"layer: got {text!r}, expected LAYER[+LAYER]...[:CAPTURE][:OPTION=VALUE]..."
                f"[=ALIAS]"
            )
        if (dtype := given.get("dtype", "")) and dtype not in SENT_DTYPES:
            raise InvalidInputError(
                f"layer: got {text!r}, expected dtype to be one of {', '.join(SENT_DTYPES)}"
            )
        capture = given.get("capture", Capture.OUTPUT.value)
        method = Method.GRADIENT
        if capture in tuple(Method):
            method = Method(capture)
            capture = Capture.GRADIENT if method.takes_gradient else Capture.OUTPUT
        return cls(
            first,
            Capture(capture),
            rest,
            _member("reduce", given.get("reduction", Reduction.NONE), Reduction),  # type: ignore[arg-type]
            dtype,
            method=method,
            map_form=_member("map", given.get("map_form", MapForm.GRID), MapForm),  # type: ignore[arg-type]
            concat=tuple(more),
            regrid=Regrid.parse(*(given.get(name, "") for name in ("around", "resize", "pool"))),
            projection=_projection(given.get("projection", ""), load),
        )

    @property
    def text(self) -> str:
        """The text that ``parse`` reads as this selection, except for a sweep or a projection."""
        names = "+".join(_SPECIAL.sub(r"\\\1", name) for name in self.layers)
        what: str = self.capture if self.method is Method.GRADIENT else self.method
        size = None if self.regrid.size is None else "{}x{}".format(*self.regrid.size)
        options = {
            "map": self.map_form if self.map_form is not MapForm.GRID else None,
            "reduce": self.reduction if self.reduction is not Reduction.NONE else None,
            "dtype": self.dtype,
            "around": self.regrid.around if self.regrid.around > 1 else None,
            "resize" if self.regrid.resize is Resize.BILINEAR else "pool": size,
        }
        given = [f":{name}={value}" for name, value in options.items() if value]
        side = "" if what == Capture.OUTPUT else f":{what}"
        return f"{names}{side}{''.join(given)}{'=' if self.alias else ''}{self.alias}"

    def name_for(self, layer: str) -> str:
        """Return the name in the reply for ``layer``, one of the layers that match this.

        For a concatenation it is ``layer2+layer3``, in place of the layer.
        """
        if self.alias:
            return self.alias
        layer = self.name if self.concat else layer
        if self.capture.is_gradient or not self.method.takes_gradient:
            side = "input_" if self.capture.side is Capture.INPUT else ""
            return f"{layer}:{side}{self.method}"
        return layer if self.capture is Capture.OUTPUT else f"{layer}:{self.capture}"


_SPECIAL = re.compile(r"([:=+\\])")
_ESCAPED = re.compile(r"\\([:=+\\])")
_OPTIONS = {
    "reduce": "reduction",
    "dtype": "dtype",
    "map": "map_form",
    "around": "around",
    "resize": "resize",
    "pool": "pool",
    "project": "projection",
}
"""The fields of a selection that are given by name, by that name."""


def _names(text: str) -> list[str]:
    """Return the names of layers that plus signs separate."""
    names, sign, rest = [], "+", text
    while sign:
        name, sign, rest = cut_at(rest, "+")
        names.append(_ESCAPED.sub(r"\1", name))
    return names


def _projection(text: str, load: Callable[[str], Projection] | None) -> Projection | None:
    if not text:
        return None
    if load is None or not text.startswith("@"):
        expected = "no file, as a matrix is sent by a client in Python" if load is None else "@FILE"
        raise InvalidInputError(f"project: got {text!r}, expected {expected}")
    return load(text[1:])


def cut_at(text: str, signs: str) -> tuple[str, str, str]:
    """Split a text like str.partition, at the first of some signs without a backslash before it."""
    places = re.finditer(rf"\\.|[{signs}]", text)
    place = next((match for match in places if match.group() in signs), None)
    return (text[: place.start()], place.group(), text[place.end() :]) if place else (text, "", "")


def _member(
    name: str, given: object, kind: type[Capture | Reduction | Method | MapForm | IntegrationRule]
) -> StrEnum:
    try:
        return kind(str(given).lower())
    except ValueError:
        raise InvalidInputError(
            f"{name}: got {given!r}, expected one of {', '.join(kind)}"
        ) from None


def is_glob(name: str) -> bool:
    """Return whether a selection's layer is a glob."""
    return any(sign in name for sign in "*?")


class Glob:
    """A glob that must match whole names; see Note [Globs].

    ``*`` and ``?`` stay within one component of a path, ``**`` crosses components.

    Note [Globs]
        Any caller may send a glob. As a regular expression, ``**?**?**?`` and so on would take
        years on a name that it doesn't match, and would block all other Python threads. So this
        follows all possible matches at once, with one bit per position in the glob. Each character
        of a name takes one step.
    """

    def __init__(self, text: str) -> None:
        # Three or more stars mean the same as two.
        self._parts = [part for part in re.split(r"(\*\*+|\*|\?)", text) if part]
        # The shortest name that can match; shorter names don't need the steps below.
        self._least = sum(len(part) for part in self._parts if not part.startswith("*"))

    def matches(self, name: str) -> bool:
        """Return whether the glob matches a whole name."""
        if len(name) < self._least:
            return False
        steps = self._steps
        places = steps.past_stars(1)
        for char in name:
            inside = char != "."
            stay = places & (steps.deep | (steps.shallow if inside else 0))
            go = places & (steps.literal.get(char, 0) | (steps.single if inside else 0))
            places = steps.past_stars(stay | go << 1)
        return bool(places >> steps.length)

    @cached_property
    def _steps(self) -> _Steps:
        return _Steps(self._parts)


class _Steps:
    """The positions in a glob at which each kind of step is possible; bit n is position n."""

    def __init__(self, parts: Iterable[str]) -> None:
        self.deep = self.shallow = self.single = self.length = 0
        self.literal: dict[str, int] = {}
        for part in parts:
            signs = [part] if part[0] in "*?" else part
            for sign in signs:
                self._add(sign, 1 << self.length)
                self.length += 1

    def past_stars(self, places: int) -> int:
        """Return the positions, with those that follow if stars match nothing."""
        return places | (places & (self.deep | self.shallow)) << 1

    def _add(self, sign: str, place: int) -> None:
        if sign == "*":
            self.shallow |= place
        elif sign.startswith("*"):
            self.deep |= place
        elif sign == "?":
            self.single |= place
        else:
            self.literal[sign] = self.literal.get(sign, 0) | place


SelectionLike = str | LayerSelection | Mapping[str, str] | Iterable[str | LayerSelection]


def parse_selections(layers: SelectionLike) -> list[LayerSelection]:
    """Convert a caller's selection of layers to a list of LayerSelection.

    Args:
        layers: One name, a LayerSelection, a list of either, or a mapping of names to aliases (the
            ``return_nodes`` convention of torchvision's ``create_feature_extractor``).

    Raises:
        InvalidInputError: If a text is not as ``LayerSelection.parse`` takes it.
    """
    if isinstance(layers, str | LayerSelection):
        layers = [layers]
    if isinstance(layers, Mapping):
        layers = [f"{layer}={alias}" for layer, alias in layers.items()]
    return [s if isinstance(s, LayerSelection) else _parsed(s) for s in layers]


def _parsed(text: str) -> LayerSelection:
    """Return what a text selects; programs ask for the same layers again and again."""
    return _remembered(text) if len(text) <= _REMEMBERED_LENGTH else LayerSelection.parse(text)


_REMEMBERED_LENGTH = 256
_remembered = lru_cache(maxsize=1024)(LayerSelection.parse)
