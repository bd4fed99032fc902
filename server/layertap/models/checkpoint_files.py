"""Which files a path given as ``weights`` stands for."""

from __future__ import annotations

from pathlib import Path, PurePath

__all__ = ["INDEX_SUFFIX", "config_folder"]

INDEX_SUFFIX = ".index.json"

# Files of these names stand in folders that Hugging Face, timm or open_clip saved, beside the
# configuration. Beside other names a config.json may be anybody's.
_PUBLISHED = ("model.", "pytorch_model.", "open_clip_", "diffusion_pytorch_model.")


def config_folder(weights: str) -> Path | None:
    """Return the folder whose configuration files belong to the weights; None if there is none."""
    path = Path(weights)
    if path.is_dir() and ("/" in weights or "\\" in weights):
        return path
    named = PurePath(weights).name
    if path.is_file() and (named.endswith(INDEX_SUFFIX) or named.startswith(_PUBLISHED)):
        return path.parent
    return None
