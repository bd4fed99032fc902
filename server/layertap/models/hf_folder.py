"""Finds the folder of a Hugging Face model: a local one, or a snapshot in the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.settings.paths import expanded

__all__ = [
    "CONFIG",
    "files_of_folder",
    "folder_of",
    "local_folder",
    "not_installed",
    "public_name",
]

CONFIG = "config.json"

_ADAPTER = "adapter_config.json"
_ADAPTER_ADVICE = (
    ". That is an adapter of PEFT, which changes another model: give a factory that builds both, "
    "as docs/huggingface.md shows, or save the model that merge_and_unload() returns"
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_CODE = "*.py"
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# The same weights in other formats, or in the form in which they were first published.
_UNWANTED = ("onnx/*", "openvino/*", "original/*", "consolidated*", "metal/*")
_READ = frozenset({".json", ".safetensors", ".bin", ".txt", ".model", ".py"})


def local_folder(target: str) -> Path | None:
    """Return the folder that a target such as ``nets/bert`` names; None if there is none.

    The target may also be the configuration file in that folder.
    """
    path = expanded(target)
    if path.is_file() and path.name == CONFIG:
        return path.parent
    return path if path.is_dir() else None


def folder_of(target: str, *, code: bool) -> Path:
    """Return the folder of a model; download it into the hub's cache if it is not there yet.

    Args:
        target: A folder, or the name of a model on the hub, such as ``google-bert/bert-base-cased``
            or ``gpt2@REVISION``. A folder with that name has priority.
        code: Whether Python files are downloaded too.

    Raises:
        ModelLoadError: The folder has no ``config.json``, or the target is neither a folder nor
            such a name.
        WeightsUnavailableError: The hub can't be asked, or has no such model.
    """
    folder = local_folder(target)
    if folder is None:
        if not _HUB_NAME.fullmatch(target):
            raise ModelLoadError(
                f"Hugging Face model {target!r}: there is no such folder; expected a folder "
                f"with a {CONFIG}, or the name of a model on the hub, such as "
                f"google-bert/bert-base-cased"
            )
        folder = _snapshot(target, code=code)
    if not (folder / CONFIG).is_file() and not (folder / "modules.json").is_file():
        names = sorted(entry.name for entry in folder.iterdir())[:8]
        adapter = _ADAPTER_ADVICE if _ADAPTER in names else ""
        raise ModelLoadError(
            f"Hugging Face model {target!r}: the folder has no {CONFIG}; it holds "
            f"{', '.join(names) or 'no file'}{adapter}"
        )
    return folder


def public_name(target: str) -> str:
    """Return the name of a target for clients, without a directory."""
    folder = local_folder(target)
    return target if folder is None else folder.absolute().name


def files_of_folder(target: str) -> tuple[Path, ...]:
    """Return the files in a local folder from which a model is loaded; empty for a hub's name.

    A revision on the hub does not change, so there is nothing to watch.
    """
    folder = local_folder(target)
    if folder is None:
        return ()
    # Modules of sentence-transformers are in subfolders.
    found = (*folder.glob("*"), *folder.glob("*/*.json"), *folder.glob("*/*.safetensors"))
    return tuple(sorted(file for file in found if file.suffix in _READ and file.is_file()))


def _snapshot(target: str, *, code: bool) -> Path:
    try:
        # Optional, as transformers is, which needs it.
        from huggingface_hub import snapshot_download  # noqa: PLC0415
    except ImportError as error:
        raise not_installed("huggingface_hub") from error
    name, _, revision = target.partition("@")
    try:
        found = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*_WANTED, *((_CODE,) if code else ())],
            ignore_patterns=list(_UNWANTED),
        )
    # The network and the hub's client raise dozens of classes.
    except Exception as error:
        raise WeightsUnavailableError(
            f"Hugging Face model {target!r}: there is no folder of that name, it is not in the "
            f"cache of this machine, and the hub can't be asked for it ({type(error).__name__}); "
            f"check the name and the network, or give a folder as hf:FOLDER"
        ) from error
    return Path(found)


def not_installed(package: str) -> ModelLoadError:
    """Return the error for a package of the extra ``layertap[hf]`` that is missing."""
    return ModelLoadError(f"{package} is not installed; install it with pip install 'layertap[hf]'")
