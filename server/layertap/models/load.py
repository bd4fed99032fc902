"""Loads a model from its spec."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace

import torch
from torch import fx, nn

from layertap.errors import ConfigError, ModelLoadError
from layertap.listing import listed
from layertap.models.arguments import Arguments, ParameterKind, parameters_of
from layertap.models.checkpoint_files import config_folder
from layertap.models.companions import companions
from layertap.models.eager import without_torch_compile
from layertap.models.factory_source import build_factory
from layertap.models.hf_source import build_hugging_face
from layertap.models.image_config import ImageConfig, config_of_folder
from layertap.models.loaded import Built, LoadedModel
from layertap.models.preprocess import choose_preprocess
from layertap.models.signature import DEFAULT_NAME, InputSpec, Signature
from layertap.models.text import TextTokenizer, tokenizer_of_file
from layertap.models.timm_source import build_timm
from layertap.models.torchscript_source import build_torchscript
from layertap.models.torchvision_source import build_torchvision
from layertap.settings import ModelSpec, SourceKind
from layertap.settings.paths import expanded

__all__ = ["load_model"]

_log = logging.getLogger(__name__)

MAX_LISTED_MODULES = 5
"""Modules that a warning lists by name."""

_BUILD: dict[SourceKind, Callable[[ModelSpec], Built]] = {
    SourceKind.TORCHVISION: build_torchvision,
    SourceKind.TORCHSCRIPT: build_torchscript,
    SourceKind.FACTORY: build_factory,
    SourceKind.TIMM: build_timm,
    SourceKind.HF: build_hugging_face,
    SourceKind.HF_CONFIG: build_hugging_face,
}


def load_model(spec: ModelSpec, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the spec's model, put it into evaluation mode, turn gradients off, move it to a device.

    What is only guessed about its input is marked in the input's ``guess``.

    Raises:
        ConfigError: The spec's image settings don't fit the model.
        ModelLoadError: it can't be built, needs an argument that is no tensor, or can't be put on
            the device.
        WeightsUnavailableError: its weights can't be had; other weights never take their place.
    """
    # Tensors made in inference mode can never take part in differentiation, and some models
    # differentiate inside their forward.
    with torch.inference_mode(False), torch.no_grad():
        return _load(spec, device)


def _load(spec: ModelSpec, device: torch.device | str) -> LoadedModel:
    config = _beside_weights(spec.weights)
    if config is not None and config.shape is not None and spec.item_shape is None:
        spec = replace(spec, item_shape=config.shape)
    built = _with_images(_eager(_BUILD[spec.kind](spec), spec.name), spec, config)
    module = built.module
    arguments = Arguments(tuple(parameters_of(module)), built.adapter)
    signature = _signature(built, spec, arguments)
    tokenizer = tokenizer_of_file(expanded(spec.tokenizer)) if spec.tokenizer else built.tokenizer
    _into_evaluation_mode(module, spec.name)
    # Not module.requires_grad_(), which TorchScript modules don't support.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        place = torch.empty(0, device=device).device
        module = _formed(module.to(place), spec, converted=built.in_precision)
    # Without CUDA, torch fails an assertion or raises; for a wrong name it raises RuntimeError.
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelLoadError(f"device {device} for model {spec.name}: {reason}") from error
    return LoadedModel(
        name=spec.name,
        source=built.source,
        weights=built.weights,
        module=module,
        device=place,
        signature=signature,
        preprocess=built.preprocess,
        image_inputs=built.image_inputs or _image_inputs(built, signature),
        tokenizer=tokenizer,
        text_inputs=_text_inputs(built, signature, tokenizer, spec),
        audio=built.audio,
        audio_inputs=built.audio_inputs,
        takes_list=built.takes_list,
        arguments=arguments,
        example=built.example,
    )


def _eager(built: Built, name: str) -> Built:
    """Return what was built without torch.compile; see Note [Without torch.compile]."""
    module, compiled = without_torch_compile(built.module)
    if compiled:
        paths = listed((path or "the model itself" for path in compiled), MAX_LISTED_MODULES)
        _log.warning(
            "model %s: layertap runs %s without torch.compile, and compiles plans of its own",
            name, paths,
        )  # fmt: skip
    return replace(built, module=module)


def _into_evaluation_mode(module: nn.Module, name: str) -> None:
    """Put every submodule into evaluation mode, even if the model's own ``train`` skips some.

    Otherwise a dropout layer would make answers random, and a batch norm would make them depend on
    the other items of the batch. What torch.export made has one mode, and its ``eval()`` raises.
    """
    with suppress(NotImplementedError) if isinstance(module, fx.GraphModule) else nullcontext():
        module.eval()
    left = [
        (path or "the model itself", part)
        for path, part in module.named_modules()
        if part.training and not isinstance(part, torch.jit.ScriptModule)
    ]
    for _, part in left:
        vars(part)["training"] = False
    if left:
        _log.warning(
            "model %s: its own eval() left %s in training mode; layertap serves every module in "
            "evaluation mode", name, listed((path for path, _ in left), MAX_LISTED_MODULES),
        )  # fmt: skip


def _formed(module: nn.Module, spec: ModelSpec, *, converted: bool) -> nn.Module:
    if spec.precision and not converted:
        module = module.to(getattr(torch, spec.precision))
    if spec.channels_last:
        # Only the weights need this layout: each convolution's output takes it from its weight.
        module = module.to(memory_format=torch.channels_last)
    return module


def _takes(takes: InputSpec, spec: ModelSpec) -> InputSpec:
    """Return the input in the model's precision; float32, which numpy knows, is also accepted."""
    if not spec.precision or not takes.dtype.is_floating_point:
        return takes
    own: torch.dtype = getattr(torch, spec.precision)
    also = () if own is torch.float32 else (torch.float32,)
    return replace(takes, dtype=own, also=also)


def _signature(built: Built, spec: ModelSpec, arguments: Arguments) -> Signature:
    """Return a module's signature, with names from its ``forward`` if the source gives none.

    Raises:
        ModelLoadError: ``forward`` needs an argument that is not a tensor.
    """
    first, *others = built.inputs
    named = [p for p in arguments.parameters if p.kind is not ParameterKind.REST]
    if first.name == DEFAULT_NAME and named and not built.adapter:
        first = replace(first, name=named[0].name)
    if built.more:
        rest = [parameter for parameter in named if parameter.name != first.name]
        others += companions(spec.name, rest, first)
    return Signature(tuple(_takes(each, spec) for each in (first, *others)), built.towers)


def _image_inputs(built: Built, signature: Signature) -> tuple[str, ...]:
    """Return the inputs that may be images; if the source doesn't say, those like the first."""
    if built.preprocess is None:
        return ()
    rank = len(signature.main.shape)
    return tuple(
        spec.name
        for spec in signature.inputs
        if len(spec.shape) == rank and spec.dtype == signature.main.dtype
    )


def _text_inputs(
    built: Built, signature: Signature, tokenizer: TextTokenizer | None, spec: ModelSpec
) -> tuple[str, ...]:
    """Return the inputs that texts become: those that the source names, else the first one.

    Raises:
        ConfigError: There is a tokenizer, and the first input is no token ids ``[B, L]``.
    """
    if tokenizer is None:
        return ()
    if built.text_inputs:
        return built.text_inputs
    main = signature.main
    if len(main.shape) != 1:
        raise ConfigError(
            f"tokenizer of {spec.name}: its first input is {main.name} {main.pattern}, expected "
            f"token ids [B, L]"
        )
    return (main.name,)


def _beside_weights(weights: str) -> ImageConfig | None:
    """Return the image settings in a checkpoint's configuration file; None if there are none."""
    folder = config_folder(weights)
    return None if folder is None else config_of_folder(folder)


def _with_images(built: Built, spec: ModelSpec, config: ImageConfig | None) -> Built:
    """Return the built model with its image preprocessing, and with the resulting item shape.

    In order of priority, the preprocessing comes from the spec, the model's own code, the
    configuration next to the weights, and the source's knowledge of the model.
    """
    index = _image_index(built)
    takes, known = built.inputs[index], built.preprocess
    if config is not None and not built.preprocess_is_code:
        known = config.preprocess(takes.shape) or known
    crop = spec.images.crop
    if crop and spec.item_shape is None and takes.free == (1, 2) and len(takes.shape) == 3:
        # Layers are measured at the size that preprocessed images have.
        takes = replace(takes, shape=(takes.shape[0], crop[0], crop[-1]))
    return replace(
        built,
        inputs=(*built.inputs[:index], takes, *built.inputs[index + 1 :]),
        preprocess=choose_preprocess(known, spec.images, takes.image, spec.name),
    )


def _image_index(built: Built) -> int:
    """Return the input for images: the first that the source names, or else the first of all."""
    names = [each.name for each in built.inputs]
    return names.index(built.image_inputs[0]) if built.image_inputs else 0
