"""Models of Hugging Face: ``hf:FOLDER``, ``hf:ORG/NAME`` and ``hf-config:FOLDER``.

Needs the extra ``layertap[hf]``.

Note [Hugging Face models]
    transformers builds the class that the spec or else ``config.json`` names, and loads the
    folder's weights into it. Some of what it does would be wrong here, and is undone or refused:

    * It creates random weights if the folder lacks some. Here that is an error, except for a
      pooling layer after the model's hidden states, which is removed from the model.
    * It maps weights from their file. If that file were overwritten, the answers of a served model
      would change, and if it were truncated, the process would end. So the weights are copied, one
      tensor after the other; a shard's mapping ends with its last tensor.
    * Code that comes with a model runs only if the spec allows it.
    * ``use_cache`` is off and ``return_dict`` is on, whatever ``config.json`` says: a single pass
      needs no cache, and a result with names is better than one with numbers.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layertap.errors import LayertapError, ModelLoadError, WeightsUnavailableError
from layertap.listing import listed
from layertap.models.arguments import parameters_of
from layertap.models.hf_audio import audio_inputs_of, audio_of_folder
from layertap.models.hf_folder import folder_of, not_installed, public_name
from layertap.models.hf_inputs import inputs_of, preprocess_of
from layertap.models.hf_tokenizer import tokenizer_of_folder
from layertap.models.hf_towers import towers_of
from layertap.models.loaded import Built
from layertap.models.seeding import seeded
from layertap.models.sentence_encoder import (
    SENTENCE_INPUTS,
    SentenceEncoder,
    has_modules,
    longest_text,
    parts_of,
    transformer_folder,
)
from layertap.models.tensor_content import plain_tensors
from layertap.models.text import IDS
from layertap.models.weights import DEFAULT, RANDOM, load_checkpoint, random_text, read_checkpoint
from layertap.settings import ModelSpec, SourceKind
from layertap.settings.paths import is_path

__all__ = ["build_hugging_face"]

_log = logging.getLogger(__name__)

_NAMED = 5
_TEXT_INPUTS = (IDS, "decoder_input_ids")
_AUTO = "AutoModel"
_POOLER = "pooler"


def build_hugging_face(spec: ModelSpec) -> Built:
    """Build a model of transformers from a folder or from the hub's cache.

    Weights: DEFAULT for the folder's own, the path of a checkpoint, or random. For a source
    ``hf-config:``, DEFAULT means random weights.

    Raises:
        ModelLoadError: transformers is not installed or doesn't know the model, the model needs
            its own code, which may not run, or its input can't be determined.
        WeightsUnavailableError: The weights can't be read, or some of them are missing.
    """
    folder = folder_of(spec.target, code=spec.trust_remote_code)
    sentences = has_modules(folder) and not spec.architecture
    place = transformer_folder(folder) if has_modules(folder) else folder
    with _quiet() as transformers:
        module = _built(transformers, spec, place, sentences=sentences)
        tokenizer = _tokenizer(transformers, spec, folder, module)
        inputs = inputs_of(module, spec, place)
        audio = audio_of_folder(transformers, place, module, inputs, code=spec.trust_remote_code)
    own = _has_own_weights(spec)
    if sentences:
        with seeded(spec.seed):
            parts = parts_of(folder, weights=own)
        module = SentenceEncoder(module, parts).to(module.dtype)
        inputs = tuple(each for each in inputs if each.name in SENTENCE_INPUTS)
    return Built(
        module=module,
        source=f"{spec.kind}:{public_name(spec.target)}",
        weights=_weights_text(spec, folder, module),
        inputs=inputs,
        preprocess=preprocess_of(place, inputs),
        image_inputs=tuple(each.name for each in inputs if each.name == "pixel_values"),
        tokenizer=tokenizer,
        text_inputs=tuple(each.name for each in inputs if each.name in _TEXT_INPUTS),
        towers=towers_of(module, inputs),
        audio=audio,
        audio_inputs=audio_inputs_of(inputs),
        in_precision=True,
    )


def _tokenizer(transformers: Any, spec: ModelSpec, folder: Path, model: Any) -> Any:
    """Return the folder's tokenizer; None if the spec names another or the model takes no ids."""
    takes_ids = {parameter.name for parameter in parameters_of(model)} & set(_TEXT_INPUTS)
    if spec.tokenizer or not takes_ids:
        return None
    most = longest_text(folder) if has_modules(folder) else 0
    place = transformer_folder(folder) if has_modules(folder) else folder
    return tokenizer_of_folder(
        transformers, place, model, most, code=spec.trust_remote_code
    ) or tokenizer_of_folder(transformers, folder, model, most, code=spec.trust_remote_code)


def _has_own_weights(spec: ModelSpec) -> bool:
    return spec.kind is SourceKind.HF and spec.weights == DEFAULT


def _built(transformers: Any, spec: ModelSpec, folder: Path, *, sentences: bool) -> Any:
    """Return the model of transformers, with the folder's weights or random ones."""
    config = _config(transformers, spec, folder)
    found = _class_of(transformers, config, spec, sentences=sentences)
    config = _config_for(found, config, spec, folder)
    if _has_own_weights(spec):
        return _with_weights(found, config, spec, folder)
    return _random(found, config, spec)


def _weights_text(spec: ModelSpec, folder: Path, module: nn.Module) -> str:
    """Return what clients read of the weights, once those of a checkpoint are in the module."""
    if _has_own_weights(spec):
        return f"{folder.name}'s own"
    if spec.weights in {DEFAULT, RANDOM}:
        return random_text(spec.seed)
    if is_path(spec.weights):
        return load_checkpoint(module, read_checkpoint(spec.weights), spec.weights_key)
    raise WeightsUnavailableError(
        f"weights of {spec.source}: got {spec.weights!r}, expected DEFAULT (the folder's own), the "
        f"path of a checkpoint, or 'random'"
    )


def _config(transformers: Any, spec: ModelSpec, folder: Path) -> Any:
    """Return the model's configuration, with layertap's constants."""
    with _explained(spec):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    return _with_constants(config)


def _config_for(found: Any, config: Any, spec: ModelSpec, folder: Path) -> Any:
    """Return the configuration of a part of a model, such as a tower, if the class is for one."""
    kind = getattr(found, "config_class", None)
    if kind is None or isinstance(config, kind):
        return config
    with _explained(spec):
        return _with_constants(kind.from_pretrained(folder, local_files_only=True))


def _with_constants(config: Any) -> Any:
    config.return_dict = True
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def _class_of(transformers: Any, config: Any, spec: ModelSpec, *, sentences: bool) -> Any:
    """Return the class to build: the spec's, the configuration's, or AutoModel.

    sentence-transformers builds models without a head; of T5 it builds only the encoder.
    """
    if sentences:
        encoder = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}.get(config.model_type, _AUTO)
        return getattr(transformers, encoder)
    name = spec.architecture or next(iter(config.architectures or ()), _AUTO)
    own = dict(getattr(config, "auto_map", None) or {})
    auto = next((key for key, value in own.items() if value.rpartition(".")[2] == name), "")
    found = getattr(transformers, auto or name, None)
    if isinstance(found, type) and (
        _is_auto(found) or issubclass(found, transformers.PreTrainedModel)
    ):
        return found
    known = [each for each in dir(transformers) if not each.startswith("_")]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
    raise ModelLoadError(
        f"{spec.source}: transformers {transformers.__version__} has no model class {name!r}"
        f"{hint}. Set architecture (--architecture) to one that it has, such as {_AUTO}"
    )


def _is_auto(found: type) -> bool:
    """Return whether a class is an Auto class, which chooses another by the configuration."""
    return found.__name__.startswith("AutoModel") and hasattr(found, "from_config")


def _options(spec: ModelSpec) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if spec.precision:
        given["dtype"] = getattr(torch, spec.precision)
    if spec.attn_implementation:
        given["attn_implementation"] = spec.attn_implementation
    return given


def _random(found: Any, config: Any, spec: ModelSpec) -> nn.Module:
    with _explained(spec), seeded(spec.seed):
        if _is_auto(found):
            module = found.from_config(
                config, trust_remote_code=spec.trust_remote_code, **_options(spec)
            )
        else:
            module = found._from_config(config, **_options(spec))
    return module  # type: ignore[no-any-return]


def _with_weights(found: Any, config: Any, spec: ModelSpec, folder: Path) -> nn.Module:
    with _explained(spec):
        module, outcome = found.from_pretrained(
            folder,
            config=config,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            # The check below names them, unlike transformers.
            ignore_mismatched_sizes=True,
            **{"dtype": "auto", **_options(spec)},
        )
    _check(module, outcome, spec)
    _own_memory(module)
    return module  # type: ignore[no-any-return]


def _check(module: nn.Module, outcome: Mapping[str, Any], spec: ModelSpec) -> None:
    """Refuse a model if some of its weights are not in the folder."""
    if outcome.get("error_msgs"):
        raise WeightsUnavailableError(
            f"weights of {spec.source}: {'; '.join(map(str, outcome['error_msgs']))}"
        )
    mismatched = sorted(outcome["mismatched_keys"])
    if mismatched:
        parts = [
            f"{key} is {list(given)}, the model has {list(own)}" for key, given, own in mismatched
        ]
        raise WeightsUnavailableError(f"weights of {spec.source}: shapes differ: {_some(parts)}")
    missing = _without_pooler(module, sorted(outcome["missing_keys"]), spec)
    if missing:
        raise WeightsUnavailableError(
            f"weights of {spec.source}: the folder lacks {_some(missing)} of a "
            f"{type(module).__name__}; layertap makes up no weights. Set architecture "
            f"(--architecture) to the class that the weights were saved from, such as {_AUTO} for "
            f"a model without a head, or weights to 'random'"
        )
    if outcome["unexpected_keys"]:
        _log.info(
            "model %s: a %s has no use for %s of the folder",
            spec.name, type(module).__name__, _some(sorted(outcome["unexpected_keys"])),
        )  # fmt: skip


def _without_pooler(module: nn.Module, missing: list[str], spec: ModelSpec) -> list[str]:
    """Remove a pooler for which the folder has no weights; return what else is missing.

    A model that was trained for masked tokens has no pooler, but ``AutoModel`` creates a random
    one. The models of transformers run without it.
    """
    of_pooler = [name for name in missing if name.startswith(f"{_POOLER}.")]
    if not of_pooler or getattr(module, _POOLER, None) is None:
        return missing
    setattr(module, _POOLER, None)
    _log.warning(
        "model %s: the folder has no weights for %s, so the model has no pooler",
        spec.name, ", ".join(of_pooler),
    )  # fmt: skip
    return [name for name in missing if name not in of_pooler]


def _own_memory(module: nn.Module) -> None:
    """Copy each tensor of a module out of the mapped files; see Note [Hugging Face models].

    Tensors that share memory still share it afterwards.
    """
    # Nothing tells whether a tensor is mapped, so each is copied.
    for tensor in chain(module.parameters(), module.buffers()):
        for plain in plain_tensors(tensor):
            # Not a new parameter, which would untie tied weights.
            plain.data = plain.detach().clone()


def _some(names: Iterable[str]) -> str:
    return listed(names, _NAMED)


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Convert any exception of transformers to a layertap error."""
    try:
        yield
    except LayertapError:
        raise
    # It raises many classes, and a model's own code may raise any other.
    except Exception as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ModelLoadError(
                f"{spec.source}: the model comes with Python code of its own, which does not run "
                f"here; read the code, then set trust_remote_code = true in the server's own "
                f"configuration"
            ) from error
        # Missing files are an OSError, broken ones a SafetensorError.
        kind = WeightsUnavailableError if _is_about_files(error) else ModelLoadError
        raise kind(f"{spec.source}: transformers: {text or type(error).__name__}") from error


def _is_about_files(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


@contextmanager
def _quiet() -> Iterator[Any]:
    """Import transformers, and silence its progress bars and reports inside the block."""
    try:
        # Optional, and slow to import: only its own models pay for it.
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise not_installed("transformers") from error
    logging_ = transformers.utils.logging
    level, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging_.set_verbosity(level)
        if bars:
            logging_.enable_progress_bar()
