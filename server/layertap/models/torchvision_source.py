"""Models built by torchvision, with its weights, a user's state dict, or random weights."""

from __future__ import annotations

import http.client
import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models.loaded import Built
from layertap.models.seeding import seeded
from layertap.models.torchvision_catalogue import Builder, Family, find_builder
from layertap.models.torchvision_inputs import input_spec, preprocess
from layertap.models.unfilled import built_with_weights
from layertap.models.weights import (
    RANDOM,
    likely_state,
    load_checkpoint,
    random_text,
    read_checkpoint,
)
from layertap.settings import ModelSpec
from layertap.settings.paths import is_path

__all__ = ["build_torchvision"]

# These files were made before torchvision's batch norms had an epsilon, so torchvision sets it to 0
# for them.
_ZERO_EPSILON = frozenset(
    {
        "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
        "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
        "retinanet_resnet50_fpn_coco-eeacb38b.pth",
    }
)


def build_torchvision(spec: ModelSpec) -> Built:
    """Build the model on the CPU and give it the weights that the spec requests.

    Raises:
        ModelLoadError: torchvision has no such model, or layertap can't serve it.
        WeightsUnavailableError: The weights can't be found or read.
    """
    builder = find_builder(spec.target)
    if spec.weights == RANDOM:
        module, member = _with_random(builder, spec), builder.reference()
        text = random_text(spec.seed)
    elif is_path(spec.weights):
        module, text = _with_file(builder, spec.weights, spec.weights_key)
        member = builder.published(spec.weights) or builder.reference()
    else:
        member = builder.member(spec.weights)
        module, text = _with_member(builder, member), str(member)
    takes = input_spec(builder, member, module, spec.item_shape)
    return Built(
        module=module,
        source=f"torchvision:{builder.name}",
        weights=text,
        inputs=(takes,),
        preprocess=preprocess(builder.family, member, takes),
        takes_list=builder.family is Family.DETECTION,
    )


def _with_random(builder: Builder, spec: ModelSpec) -> nn.Module:
    options = _options(builder)
    if builder.name in {"googlenet", "inception_v3"}:
        options["init_weights"] = True
    if builder.name.startswith("vit_") and spec.item_shape:
        options["image_size"] = spec.item_shape[-1]
    with seeded(spec.seed):
        return _build(builder, options)


def _with_file(builder: Builder, path: str, key: str) -> tuple[nn.Module, str]:
    checkpoint = read_checkpoint(path)
    options = _options(builder) | _options_of(builder, likely_state(checkpoint, key))
    published = builder.published(path)
    if published and builder.name in {"googlenet", "inception_v3"}:
        options["transform_input"] = True
    text = ""

    def build() -> nn.Module:
        nonlocal text
        with seeded(0):
            module = _build(builder, options)
        text = load_checkpoint(module, checkpoint, key)
        return module

    module = built_with_weights(build)
    if builder.name == "googlenet":
        _drop_auxiliary_heads(module)
    if PurePath(path).name in _ZERO_EPSILON:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 0.0
    return module, text


def _with_member(builder: Builder, member: Any) -> nn.Module:
    """Let torchvision build and load the model: some weights need more than their state dict."""
    cached = Path(torch.hub.get_dir(), "checkpoints", PurePath(member.url).name)
    was_cached = cached.exists()

    def build() -> nn.Module:
        with seeded(0):
            return builder.build(weights=member, progress=sys.stderr.isatty())

    try:
        return built_with_weights(build)
    # HTTPError, URLError and socket errors are OSErrors. A wrong hash and a damaged or foreign file
    # are RuntimeErrors or other exceptions of torch's unpickler.
    except (
        OSError,
        http.client.HTTPException,
        RuntimeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise _unavailable(member, cached, was_cached, error) from error


def _unavailable(
    member: Any, cached: Path, was_cached: bool, error: Exception
) -> WeightsUnavailableError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if was_cached:
        return WeightsUnavailableError(
            f"weights {member}: the file {cached} can't be loaded ({reason}); delete it, so that "
            "it is downloaded again, or use --weights PATH or --weights random"
        )
    return WeightsUnavailableError(
        f"weights {member} can't be downloaded ({reason}). On a machine with a network: "
        f"curl -o {cached} --create-dirs {member.url} (TORCH_HOME moves that folder). Or use "
        "--weights PATH for a state dict of your own, or --weights random"
    )


def _options(builder: Builder) -> dict[str, Any]:
    """Return arguments for building the modules of torchvision's weights, without the weights."""
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in builder.parameters:
        options["weights_backbone"] = None
    if "aux_loss" in builder.parameters:
        options["aux_loss"] = True
    if builder.name in {"googlenet", "inception_v3"}:
        # Without init_weights, torchvision gives a FutureWarning.
        options["init_weights"] = False
        options["aux_logits"] = builder.name == "inception_v3"
    return options


def _options_of(builder: Builder, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments that a state dict's keys and shapes determine."""
    options: dict[str, Any] = {}
    if "aux_loss" in builder.parameters:
        options["aux_loss"] = any(key.startswith("aux_classifier.") for key in state)
    if builder.name in {"googlenet", "inception_v3"}:
        options["aux_logits"] = any(key.startswith(("aux1.", "AuxLogits.")) for key in state)
    if builder.name.startswith("vit_") and {"encoder.pos_embedding", "conv_proj.weight"} <= set(
        state
    ):
        # [1, 1 + (patches per side) ** 2, D]: one class token, then the patches.
        patches = math.isqrt(max(0, state["encoder.pos_embedding"].shape[1] - 1))
        options["image_size"] = patches * state["conv_proj.weight"].shape[-1]
    return options


def _build(builder: Builder, options: dict[str, Any]) -> nn.Module:
    try:
        return builder.build(**options)
    except (ValueError, AssertionError) as error:
        raise ModelLoadError(
            f"model {builder.name}: torchvision can't build it: {error}"
        ) from error


def _drop_auxiliary_heads(module: Any) -> None:
    """Remove googlenet's training heads, as torchvision does with its own weights."""
    module.aux_logits = False
    module.aux1 = None
    module.aux2 = None
